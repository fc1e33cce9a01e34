#!/usr/bin/env bash
# Traces and archives the demo's models into model_store/, unless they are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

base=sentence-transformers/all-MiniLM-L6-v2
library=$(python -c 'import ft_handler; print(ft_handler.load_library())')

# make_model NAME MODE [TRACE-OPTION...]
make_model() {
    local name=$1 mode=$2
    shift 2
    local archive=model_store/$name.mar
    if [[ $archive -nt $library ]]; then
        echo "== $archive is up to date"
        return
    fi
    echo "== tracing $name"
    ft-handler trace --mode "$mode" --model_name_or_path "$base" "$@" --output "build/demo/$name"
    echo "== archiving $name"
    ft-handler archive "build/demo/$name" --model-name "$name" --export-path model_store --force
}

mkdir -p model_store build/demo
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
names=() running=()
# start NAME MODE [TRACE-OPTION...]: tracing is mostly one thread's work, so all models are made at once.
start() {
    make_model "$@" > "build/demo/$1.log" 2>&1 &
    names+=("$1") running+=($!)
}
start sentiment sequence_classification --adapter examples/sequence_classification/adapter
start qa question_answering --adapter examples/question_answering/adapter
start embeddings embeddings
failed=0
for i in "${!running[@]}"; do
    wait "${running[i]}" || failed=1
    cat "build/demo/${names[i]}.log"
done
exit "$failed"
