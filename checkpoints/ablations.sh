#!/usr/bin/env bash
# Trains the routers that the tables of docs/abacus.md compare, and prints these.
#   bash checkpoints/ablations.sh
# After checkpoints/make.sh, whose labels it uses. Resumable: what is labeled, trained or answered stays.
set -euo pipefail
cd "$(dirname "$0")/.."

fit() { # GRANULARITY NAME OPTION...
    local router=runs/ablations/$1-$2
    [ -e "$router" ] || r2r-glimp fit --config "configs/training/abacus-$1.yaml" --wandb off \
        --export_dir "$router" --trainer.default_root_dir "runs/fit/$1-$2" "${@:3}"
}
label() { # NAME OPTION...
    r2r-glimp label --config configs/labeling/abacus.yaml --out "runs/labels/$1" "${@:2}"
}
only() { # FEATURE: the options that leave it alone
    for name in hidden candidate entropy margin; do
        [ "$name" = "$1" ] || echo "--model.$name=false"
    done
    [ "$1" = top_k_logits ] || echo "--model.top_k_logits=0"
}

[ -e checkpoints/abacus-slm-adapter ] ||
    python -m training.align --config configs/training/abacus-align.yaml --wandb off
label abacus-aligned --pair abacus-aligned
for granularity in token step; do
    fit $granularity different --data.positive different
    fit $granularity hidden $(only hidden)
    fit $granularity logits $(only top_k_logits)
    label abacus-on-policy-$granularity --granularity $granularity --responses.by pair \
        --responses.router "checkpoints/abacus-$granularity-router"
    fit $granularity on-policy --data.path "runs/labels/abacus-on-policy-$granularity/dataset"
done
for granularity in token step; do
    r2r-glimp evaluate --config "configs/evaluation/abacus-ablations-$granularity.yaml"
done
r2r-glimp evaluate --config configs/evaluation/abacus-aligned.yaml
