#!/bin/sh
# CIFAR-10 from the download to FID:  sh benchmarks/cifar10.sh [flags of the runs]
#
# Trains the cifar10 preset with and without classes on 100 million images each, on all GPUs of the machine. After 10,
# 25, 50 and 100 million it computes FID from 50,000 samples at 4, 6, 8, 10, 20 and 35 evaluations of the network, and
# prints the table so far next to published numbers. After a stop, the same command continues. With flags, such as
# --optimizer muon, use another folder: CKPTS=ckpts/muon.
#
# CKPTS    folder of the runs (ckpts)           NUM      samples of each FID (50000)
# UNIT     steps of 5 million images (9766)     NFE      evaluations (4 6 8 10 20 35)
# WEIGHTS  file of Inception's weights (downloaded)
set -eu
cd -- "$(dirname -- "$0")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
[ -z "${VIRTUAL_ENV:-}" ] || python=$VIRTUAL_ENV/bin/python
folder=${CKPTS:-ckpts} unit=${UNIT:-9766}

train() { # steps, flags ...; reads name and dropout
    sh run.sh --preset cifar10 --experiment_name "$name" --ckpt_dir "$folder" --label_dropout "$dropout" \
        --no_final_eval --no_final_pictures --num_training_steps "$@"
}

for stage in 2 5 10 20; do
    for kind in conditional unconditional; do
        dropout=0.1
        [ $kind = conditional ] || dropout=1
        name=cifar10_$kind
        [ -d "$folder/$name" ] || train $((20 * unit)) --check "$@" # prints hours and memory
        train $((stage * unit)) "$@"
        sh run.sh evaluate.py --run "$folder/$name" --num "${NUM:-50000}" --nfe ${NFE:-4 6 8 10 20 35} \
            --detector inception ${WEIGHTS:+--detector_weights "$WEIGHTS"}
    done
    "$python" benchmarks/cifar10.py "$folder"
done
