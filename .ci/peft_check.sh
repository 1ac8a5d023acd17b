#!/usr/bin/env bash
# PEFT's own tests of its adapters with `use_fused_adapters` on every layer: what fails then must fail without it too. Not a
# step of .ci/run: it installs an environment of its own, and there are 11,000 tests (W2S_FAST_EVERY=8 takes each eighth).
#   bash .ci/peft_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment
#   PEFT_PYTHON=python bash .ci/peft_check.sh FOLDER       one that has all of it, such as .venv/bin/python
# The tests are those of PEFT's source package, which has them; what they load from the hub is made by peft_stand_ins.py.
# Those that want more of it fail, with or without. Of the tests of language models only those of the adapters that are
# served are taken.
. "$(dirname "$0")/beside.sh"
peft=${PEFT:-peft==0.21.2} source=$PWD

python=${PEFT_PYTHON:-$python}
[ -x "$python" ] || beside peft "torch" "$peft" parameterized "datasets>=3.0" scipy scikit-learn
if [ ! -d "$folder/hub" ]; then
  mkdir -p "$folder"
  "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$folder" "$peft"
  mkdir -p "$folder/source" && tar xzf "$folder"/peft-*.tar.gz -C "$folder/source" --strip-components 1
  touch "$folder/source/tests/__init__.py"  # which the package has not
  "$python" .ci/peft_stand_ins.py "$folder/hub"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false W2S_FAST_CALIBRATION=off  # our way, whatever is faster here
folder=$(realpath "$folder")
export HF_HOME=$folder/hf
tests=$folder/source/tests
# tests of one of these adapters, and those of none in particular
ours="not Config-"
for one in Lora Miss RandLora Vera; do ours+=" or [${one}Config- or -${one}Config-"; done
run() {  # SWAP, its name, and further arguments of pytest: 1 where tests fail, 5 where there are none
  (cd "$folder/hub" && W2S_FAST_SWAP=$1 PYTHONPATH=$source:$source/.ci "$python" -W ignore -m pytest -q --tb=no \
    -p no:cacheprovider -p peft_stand_ins -c /dev/null --rootdir "$(dirname "$tests")" --junitxml "$folder/$2.xml" \
    -k "$ours" "${@:3}") || { local rc=$?; [ $rc -eq 1 ] || [ $rc -eq 5 ]; }
}
files=(); for one in custom_models decoder_models lora_variants; do files+=("$tests/test_$one.py"); done
run 1 on "${files[@]}" "$@"
export W2S_FAST_FAILED=$folder/on.xml
run 0 off "${files[@]}" "$@"
"$python" .ci/outcomes.py "$folder/off.xml" "$folder/on.xml"
