"""Reparametrised LoRA in two processes that shard it, beside the same model in one, for the tests of both.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.reparametrized_run OUTPUT_DIR

Both processes check every case, in float64. Each writes what failed to OUTPUT_DIR/PROCESS.json, by the case's name.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import reparametrized_fsdp1, reparametrized_fsdp2

CASES = [*reparametrized_fsdp2.CASES, *reparametrized_fsdp1.CASES]


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    failed: dict[str, str] = {}
    file = output_dir / f"{dist.get_rank()}.json"
    for case in CASES:
        directory = output_dir / case.__name__
        directory.mkdir(exist_ok=True)
        try:
            case(directory)
            dist.barrier()
        except Exception:
            failed[case.__name__] = traceback.format_exc()
        file.write_text(json.dumps({"failed": failed, "last": case.__name__}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
