"""Train a small language model and a small vision transformer from scratch in fewer parameters, in five ways, offline.

    python examples/train_low_rank.py            # three seeds of all methods: some minutes on two CPU cores
    python examples/train_low_rank.py --tune     # what the learning rates were chosen by, on other seeds
    python examples/train_low_rank.py --quick    # whether everything runs; the figures mean nothing

A byte-level Llama learns docstrings of installed packages, a ViT scikit-learn's digits under noise. Beside the dense
models stand, with equally many parameters in the end and equally many steps:

- low-rank: U V in each layer, from the first step on;
- SLTrain: U V of a lower rank, and a sparse part on a random support with the parameters that this leaves;
- Maestro: full rank at first, with ordered components, cut nine times until half of the steps are done, then to the
  low-rank model's number of weights; each layer loses what is least beside the whole of it;
- TRP: dense, truncated every fifth step; after half of the steps cut by the SVD to that number, greedily over layers,
  and trained on as factors, as its authors do after the decomposition;
- SVD: the same without truncating before, which shows what of TRP is TRP's.

Judged is the perplexity, or the accuracy, on texts and images that nothing was trained on. Exact bytes of a training
step are counted, and times measured beside the dense model's. Each method has its own learning rate. Finished runs are
lines of JSON, and are not run again; a run that was stopped is run again from its start, which takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

from low_rank_report import SEEDS, TUNING_SEEDS, draw, table, tuning_table  # it finds the benchmarks
from low_rank_study import CHOSEN, RATES, Study
from study_options import make_folders, parse_study, stop, study_parser


def main() -> None:
    args = parse_study(study_parser(__doc__, "train_low_rank_output"))
    make_folders(args)
    study = Study(
        seeds=TUNING_SEEDS if args.tune else SEEDS[:2] if args.quick else SEEDS,
        rates=RATES if args.tune else None,
        folder=args.output_dir,
        results=args.results,
    )
    if args.quick:
        study = replace(study, steps=8, rounds=1, judged=64)
    try:
        results = study.run()
    except RuntimeError as error:  # a package whose docstrings are data is not installed
        stop(str(error))
    if args.tune:
        print(tuning_table(results, CHOSEN))
        return
    print(table(results))
    draw(results).savefig(args.results / "low_rank_training.png", dpi=110)
    print(f"Saved low_rank_training.jsonl and low_rank_training.png in {args.results}")


if __name__ == "__main__":
    main()
