#!/usr/bin/env bash
# Makes the bundled routers: label, fit, calibrate, and what publishing them would do.
#   bash checkpoints/make.sh
# Resumable: what is labeled stays labeled. The pair beside it is made by `r2r_glimp.abacus.train`.
set -euo pipefail
cd "$(dirname "$0")/.."
r2r-glimp label --config configs/labeling/abacus.yaml
for granularity in token step; do
    router=checkpoints/abacus-$granularity-router
    r2r-glimp fit --config "configs/training/abacus-$granularity.yaml" --overwrite --wandb off
    r2r-glimp calibrate --config "configs/calibration/abacus-$granularity.yaml" --router "$router"
    r2r-glimp push "$router" "r2r-glimp/abacus-$granularity-router" --dry_run
done
