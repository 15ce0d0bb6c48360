#!/bin/bash
# Two machines with four GPUs each under LSF with jsrun. Submit with: bsub < lsf.sh
#
# The lines that begin with #BSUB are read by bsub, although they look like comments.

#BSUB -J waves
#BSUB -nnodes 2                  # machines: the same number as --nrs and --num-nodes below
#BSUB -W 4:00
#BSUB -o waves-%J.log            # %J is the job's number

# A resource set (rs) is one machine here, with a task for each GPU. All tasks of a set see all of its GPUs.
jsrun --nrs 2 --tasks_per_rs 4 --gpu_per_rs 4 --cpu_per_rs 32 \
    python train.py --devices 4 --num-nodes 2 --accelerator cuda --out "$LS_SUBCWD/runs/waves"
