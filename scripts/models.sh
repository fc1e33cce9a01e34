#!/usr/bin/env bash
# Traces and archives the two demo models into model_store/, unless they are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

base=sentence-transformers/all-MiniLM-L6-v2
library=$(python -c 'import ft_handler; print(ft_handler.load_library())')

# make_model NAME MODE EXAMPLE
make_model() {
    local archive=model_store/$1.mar
    if [[ $archive -nt $library ]]; then
        echo "== $archive is up to date"
        return
    fi
    echo "== tracing $1 (base model and LoRA adapter)"
    ft-handler trace --mode "$2" --model_name_or_path "$base" \
        --adapter "examples/$3/adapter" --output "build/demo/$1"
    echo "== archiving $1"
    ft-handler archive "build/demo/$1" --model-name "$1" --export-path model_store --force
}

mkdir -p model_store
make_model sentiment sequence_classification sequence_classification
make_model qa question_answering question_answering
