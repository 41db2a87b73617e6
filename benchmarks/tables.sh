#!/bin/sh
# Measures every table of README and docs once more, one after the other: hours of two idle cores.
#
#   sh benchmarks/tables.sh [NAME ...]      all, or only these: records solvers pairs ...
#
# A table that was measured to its end gets a line "NAME COMMIT" in benchmarks/tables.txt, and is left out when this is
# called again; delete the line to repeat it. pairs, examples, recipes and quality continue in the middle, from their
# .jsonl files: delete these, too, to begin again. All output is in benchmarks/tables.log: tables that no page takes
# from a file are there. `records` comes first, because it needs code without changes, and benchmarks change files.
set -eu
CDPATH= cd -- "$(dirname -- "$0")/.."
export OMP_NUM_THREADS=1 NPROC=1 WANDB_MODE=disabled

records() { # of each preset that needs no GPU; small_images: Tux Paint's stamps in data/stamps
    for preset in digits digits_long digits_dit toy2d fashion_mnist small_images; do
        set -- --preset "$preset" --experiment_name "$preset"
        [ "$preset" != small_images ] || set -- "$@" --data_path data/stamps
        sh run.sh "$@"
        python benchmarks/records.py "ckpts/$preset"
    done
}

solvers() {
    for mixture in ring anisotropic held_out sharp squared_cosine shifted_cosine; do
        python benchmarks/solvers.py "$mixture"
    done
    python benchmarks/solvers.py digits --checkpoint ckpts/digits_long/last.pt
}

likelihood() {
    sh run.sh --num_training_steps 600 --dequantize --experiment_name likelihood
    python benchmarks/likelihood.py --checkpoint ckpts/likelihood/last.pt
}

digits() { OMP_NUM_THREADS=2 python benchmarks/digits.py --seeds 5 --peer_seeds 3; }

[ "$#" -gt 0 ] || set -- records solvers likelihood digits data loop networks startup sampling_share scaling saves \
    overlap checkpointing afternoon pairs recipes examples quality
for name in "$@"; do
    if grep -qs "^$name " benchmarks/tables.txt; then continue; fi
    echo "$name, in benchmarks/tables.log"
    case $name in
        records | solvers | likelihood | digits) command=$name ;;
        *) command="python benchmarks/$name.py" ;;
    esac
    $command >> benchmarks/tables.log 2>&1
    echo "$name $(git rev-parse --short HEAD)" >> benchmarks/tables.txt
done
