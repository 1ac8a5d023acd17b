#!/usr/bin/env bash
# PEFT's own tests of its adapters without and with `use_fused_adapters` on every layer: each must end alike. Not a step of
# .ci/run: it installs an environment of its own, and takes half an hour.
#   bash .ci/peft_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment
#   PEFT_PYTHON=python bash .ci/peft_check.sh FOLDER       one that has all of it, such as .venv/bin/python
# The tests are those of PEFT's source package, which has them; what they load from the hub is made by peft_stand_ins.py.
# Those that want more of it fail, alike in both runs. Of the tests of language models only those of the adapters that are
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
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
folder=$(realpath "$folder")
export HF_HOME=$folder/hf
tests=$folder/source/tests
# tests of one of these adapters, and those of none in particular
ours="not Config-"
for one in Lora Miss RandLora Vera; do ours+=" or [${one}Config- or -${one}Config-"; done
run() {  # SWAP, its name, and further arguments of pytest: 1 where tests fail, which is what is compared
  (cd "$folder/hub" && W2S_FAST_SWAP=$1 PYTHONPATH=$source:$source/.ci "$python" -W ignore -m pytest -q --tb=no \
    -p no:cacheprovider -p peft_stand_ins -c /dev/null --rootdir "$(dirname "$tests")" --junitxml "$folder/$2.xml" \
    -k "$ours" "${@:3}") || [ $? -eq 1 ]
}
files=(); for one in custom_models decoder_models lora_variants; do files+=("$tests/test_$one.py"); done
for way in 0:off 1:on; do
  run "${way%:*}" "${way#*:}" "${files[@]}" "$@"
done
"$python" .ci/outcomes.py "$folder/off.xml" "$folder/on.xml"
