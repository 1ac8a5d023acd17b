#!/usr/bin/env bash
# TRL's own trainer tests without and with `use_fused_logprobs`: each must end alike. Not a step of .ci/run: it installs half
# a gigabyte, and wants TRL's tests, which no package of TRL holds.
#   TRL_TESTS=checkout/tests bash .ci/trl_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment
# TRL_FILES="sft experimental/gkd": these of TRL's files of tests, for all that the swap reaches.
# For TRL 1.16: without the swap the functions of 1.15 run in Triton only, so on a CPU there is nothing to compare with. What
# the tests load from the hub is made by trl_stand_ins.py; those that want more of it fail, alike in both runs, as do tests of
# another version than TRL's. Those of images, vLLM and accelerators are left out.
tests=$(realpath "${TRL_TESTS:?the folder tests of a checkout of TRL}")
. "$(dirname "$0")/beside.sh"
trl=${TRL:-trl==1.16.0} source=$PWD

if [ ! -x "$python" ]; then
  beside trl "torch" "$trl" "${PEFT:-peft}" psutil pillow
  "$python" .ci/trl_stand_ins.py "$folder/hub"
fi
export HF_HUB_OFFLINE=1 HF_HOME=$folder/hf TOKENIZERS_PARALLELISM=false
folder=$(realpath "$folder")
rm -rf "$folder/tests" && cp -r "$tests" "$folder/tests"  # beside the checkout's own trl they would import that
run() {  # SWAP, the file of results, and further arguments of pytest: 1 where tests fail, which is what is compared
  (cd "$folder/hub" && W2S_FAST_SWAP=$1 PYTHONPATH=$source:$source/.ci "$folder/bin/python" -W ignore -m pytest -q --tb=no \
    -p no:cacheprovider -p trl_stand_ins -c /dev/null --rootdir "$folder" --junitxml "$2" \
    -k "not VLM and not Vision and not Slow and not vllm" "${@:3}") || [ $? -eq 1 ]
}
alike=0
for one in ${TRL_FILES:-sft dpo kto rloo grpo experimental/gkd experimental/gold experimental/gmpo}; do
  file=$folder/tests/${one%"${one##*/}"}test_${one##*/}_trainer.py results=$folder/${one##*/}
  echo "== $one"
  run 0 "$results.off.xml" "$file" "$@"
  run 1 "$results.on.xml" "$file" "$@"
  "$python" .ci/outcomes.py "$results.off.xml" "$results.on.xml" || alike=1
done
exit $alike
