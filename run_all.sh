#!/usr/bin/env bash
# The whole of CMKD: prepare fbanks, train teachers, distill both ways, train the students without KD, average weights, score,
# print the table. What is finished is skipped, so the same command resumes after an interruption; the first failure stops it.
#
#   bash run_all.sh demo                                     # synthetic, 4 to 7 minutes on two cores
#   ROOT=/data/ESC-50 bash run_all.sh esc50                  # also esc10, fsd50k, audioset, audioset-bal
#   GPUS=8 SEEDS="0 1 2" ROOT=/data/FSD50K bash run_all.sh fsd50k
#   bash run_all.sh data/machines                            # a folder that prep_data.py wrote
#
# Knobs, by environment:
#   ROOT            the raw data on disk                     esc50 (esc10 too), fsd50k: downloaded to data/NAME-audio
#   EXP             where runs go                            exp/NAME
#   CNN, AST        the students                             efficientnet-b2, ast-base (demo: timm:resnet10t, ast-tiny)
#   CNN_TEACHERS    who teaches the AST                      CNN if that is set; fsd50k: efficientnet-b0 densenet-121
#   AST_TEACHERS    who teaches the CNN                      AST if that is set; fsd50k: ast-tiny
#   PRETRAINED_CNN, PRETRAINED_AST   no, imagenet or a path  imagenet (demo: no)
#   BASELINES       0: no students without KD                1
#   SEEDS           a list; several give ensemble rows       0
#   FOLDS           a list, for data with folds              1 2 3 4 5 for esc10 and esc50
#   EPOCHS, LR_CNN, LR_AST, BATCH_CNN, BATCH_AST, RECIPE     the recipe table of train_teacher.py
#   PATCHOUT, PRECISION   "4 40": patches that ASTs drop     none (demo: 4 3); bfloat16 on a GPU, float32 on a CPU
#   GPUS, WORKERS   processes of training, of preparation    1, one for each core
#   KEEP_EPOCHS     1: keep ep-NN.pt after averaging         0
#   PYTHON          the interpreter                          python
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; exit "$1"; }
[ $# -eq 1 ] || usage 2
HERE=$(dirname "$(readlink -f "$0")")
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python)}
case $1 in
  -h | --help) usage 0 ;;
  demo | esc10 | esc50 | fsd50k | audioset) NAME=$1 DATA=data/$1 ;;
  audioset-bal) NAME=$1 DATA=data/audioset RECIPE=audioset-bal ;; # one prepared folder serves both
  *)
    unknown="'$1' is neither demo, esc10, esc50, fsd50k, audioset, audioset-bal nor a folder that prep_data.py finished (no stats.json)"
    [ -f "$1/stats.json" ] || { echo "run_all.sh: $unknown" >&2; exit 2; }
    DATA=${1%/} NAME=$(basename "$(CDPATH= cd "$1" && pwd)")
    ;;
esac
case $NAME in
  demo) : "${CNN:=timm:resnet10t}" "${AST:=ast-tiny}" "${PATCHOUT:=4 3}" ;;
  esc10 | esc50) : "${FOLDS:=1 2 3 4 5}" ;;
  fsd50k) : "${CNN_TEACHERS:=${CNN:-efficientnet-b0 densenet-121}}" "${AST_TEACHERS:=${AST:-ast-tiny}}" ;;
esac
: "${FOLDS:=none}" "${SEEDS:=0}" "${CNN:=efficientnet-b2}" "${AST:=ast-base}"
: "${CNN_TEACHERS:=$CNN}" "${AST_TEACHERS:=$AST}" "${BASELINES:=1}" "${EXP:=exp/$NAME}"

stage() { # NAME COMMAND...: run a stage, or stop with its name
  local name=$1 code=0
  shift
  echo "=== $name"
  "$@" & # in the background, so that a signal reaches this script at once
  child=$!
  wait $child || code=$?
  [ $code -eq 0 ] || { echo "run_all.sh: stage '$name' failed (exit code $code); fix it and run the same command again" >&2; exit $code; }
}
stop() { # a pre-emption, Ctrl-C or hang-up: the stage finishes its step and saves
  [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null && wait "$child" || true; }
  echo "run_all.sh: stopped; the same command resumes" >&2
  exit 143
}
child=
trap stop TERM INT HUP
python_n() { # on several GPUs through torchrun; exec, in the shell that a stage is, or a signal would end at that shell
  trap '' INT HUP # which a terminal sends to all of its processes: `stop` sends TERM
  [ "${GPUS:-1}" -gt 1 ] || exec "$PYTHON" "$@"
  # of Ctrl-C and, under nohup, of a hang-up, torchrun would tell the workers, which would end unsaved
  exec "$PYTHON" -m torch.distributed.run --standalone --signals-to-handle=SIGTERM --nproc_per_node="$GPUS" "$@"
}
run_of() { echo "$EXP/${1//:/-}${2:+-from-${2//:/-}}$tail"; } # MODEL [TEACHERS joined by +]

train() { # MODEL [TEACHER...]: train a model, average its epochs, score it
  local model=$1 out kind=CNN script=train_teacher flags=()
  shift
  out=$(run_of "$model" "$(IFS=+; echo "$*")")
  case $model in ast-*) kind=AST ;; esac
  local pretrained=PRETRAINED_$kind lr=LR_$kind batch=BATCH_$kind
  [ $# -eq 0 ] || script=distill flags=(--teacher)
  for t in "$@"; do flags+=("$(run_of "$t")/best.pt"); done
  flags+=(${!pretrained:+--pretrained "${!pretrained}"} ${!lr:+--lr "${!lr}"} ${!batch:+--batch-size "${!batch}"})
  flags+=(${EPOCHS:+--epochs "$EPOCHS"} ${RECIPE:+--recipe "$RECIPE"} ${PRECISION:+--precision "$PRECISION"})
  [ $kind = CNN ] || [ -z "${PATCHOUT:-}" ] || flags+=(--patchout $PATCHOUT)
  [ "$fold" = none ] || flags+=(--fold "$fold")
  [ "${KEEP_EPOCHS:-0}" = 0 ] || flags+=(--keep-epochs)
  stage "${script%_teacher} $out" python_n "$HERE/$script.py" --data "$DATA" --model "$model" --seed "$seed" --out "$out" ${flags[@]+"${flags[@]}"}
  local epochs=("$out"/ep-*.pt)
  if [ -e "${epochs[0]}" ] && { [ ! "$out/wa.pt" -nt "$out/last.pt" ] || [ ! -e "$out/ep-00.pt" ]; }; then
    stage "average $out" python_n "$HERE/evaluate.py" --average "$out"
  fi
  for ckpt in best wa; do
    if [ -f "$out/$ckpt.pt" ] && [ ! "$out/metrics-$ckpt-eval.json" -nt "$out/$ckpt.pt" ]; then
      stage "evaluate $out/$ckpt.pt" python_n "$HERE/evaluate.py" --ckpt "$out/$ckpt.pt"
    fi
  done
  settings+=("${out%-s*}") # runs that differ in the seed only
}

if [ ! -f "$DATA/stats.json" ]; then
  stage "prepare $DATA" "$PYTHON" "$HERE/prep_data.py" "${DATA#data/}" --out "$DATA" ${ROOT:+--root "$ROOT"} ${WORKERS:+--workers "$WORKERS"}
fi
for fold in $FOLDS; do
  for seed in $SEEDS; do
    tail="$([ "$fold" = none ] || echo "-fold$fold")-s$seed" settings=()
    for model in $(printf '%s\n' $CNN_TEACHERS $AST_TEACHERS $([ "$BASELINES" = 0 ] || echo "$CNN $AST") | awk '!seen[$0]++'); do
      train "$model"
    done
    train "$AST" $CNN_TEACHERS
    train "$CNN" $AST_TEACHERS
  done
  if [ "$(wc -w <<<"$SEEDS")" -gt 1 ]; then # an ensemble over seeds of each setting's averaged weights, or of its best
    for setting in "${settings[@]}"; do
      members=()
      for seed in $SEEDS; do
        members+=("$setting-s$seed/$([ -f "$setting-s$seed/wa.pt" ] && echo wa || echo best).pt")
      done
      together=$EXP/ensemble-$(basename "$setting")/metrics-$(basename "${members[0]}" .pt)-eval.json
      newest=$(ls -t "${members[@]}" | head -1)
      { [ "$together" -nt "$newest" ] && [ "$(grep -o '[^/"]*/[^/"]*\.pt' "$together")" = "$(printf '%s\n' "${members[@]#"$EXP/"}")" ]; } ||
        stage "ensemble $together" python_n "$HERE/evaluate.py" --ckpt "${members[@]}" # the seeds may be others, and older
    done
  fi
done
stage summary "$PYTHON" "$HERE/evaluate.py" --summary "$EXP"
