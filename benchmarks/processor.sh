#!/usr/bin/env bash
# What is to be known of a processor: every precision beside other engines, through TorchServe, and
# what a worker takes. Writes benchmarks/results/cpu-*-NAME.json, then the tables of the pages.
#
#   benchmarks/processor.sh NAME [STEP ...]
#
#   NAME   in the files' names, such as zen3 or amx-2
#   STEP   table       the encoder row of the README: every engine, fp32, bf16 and int8
#          encoder     BERT-base and MiniLM on one text and 16, ours and other engines in int8
#          large       the same of BERT-large on sentences, without OpenVINO
#          gemms       fp32 and bf16 beside the products alone, from one short text on
#          serving     MiniLM through TorchServe, ours in every precision and the published behaviour
#          memory      a worker of BERT-base in every precision
#          default: all but gemms, in an order in which converted models are used again
#
# FT_HANDLER_CPU_ISA picks our instruction set; CT2_FORCE_CPU_ISA and MKL_ENABLE_INSTRUCTIONS that of
# CTranslate2. FOLDER keeps converted models for the next run too.
set -euo pipefail
cd "$(dirname "$0")/.."

name=$1
shift
[[ $# -gt 0 ]] || set -- table encoder large serving memory
# Taken once: results that a step writes over are changes to the next one.
if [[ -z ${FT_HANDLER_COMMIT:-} ]]; then
    if [[ -n $(git status --porcelain -uno) ]]; then
        echo "error: uncommitted changes: nobody could make these figures again" >&2
        exit 2
    fi
    FT_HANDLER_COMMIT=$(git rev-parse HEAD)
    export FT_HANDLER_COMMIT
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=benchmarks/results
if [[ -z ${FOLDER:-} ]]; then
    FOLDER=$(mktemp -d)
    trap 'rm -rf "$FOLDER"' EXIT
fi
others=(ctranslate2_int8 onnxruntime_int8)

encoder() {
    local file=$1
    shift
    python benchmarks/encoder.py --no-plot --folder "$FOLDER" --out "$out/cpu-$file.json" "$@"
}

for step in "$@"; do
    SECONDS=0
    echo "== $step"
    case $step in
    table)
        # Without bf16 instructions plain torch takes 17 s a batch in it.
        encoder "encoder-$name" --rounds 3 --skip hf_bf16 compile_bf16 packed_bf16 gemms_bf16
        ;;
    encoder)
        encoder "precisions-$name" --model base minilm --lengths sst2 squad --batch 1 16 --rounds 3 \
            --columns ours gemms_fp32 "${others[@]}" openvino_int8
        ;;
    large)
        echo "left out: openvino_int8: NNCF takes minutes for it"
        encoder "precisions-$name-large" --model large --lengths sst2 --batch 1 16 --rounds 3 \
            --columns ours gemms_fp32 "${others[@]}"
        ;;
    gemms)
        encoder "precisions-$name-gemms" --precisions fp32 bf16 --lengths sst2 ragged \
            --batch 1 2 4 8 16 --columns ours gemms
        ;;
    serving)
        python benchmarks/serving.py --precision fp32 bf16 int8 --systems ours published \
            --connections 64 --rounds 2 --seconds 5 --out "$out/cpu-serving-$name.json"
        ;;
    memory) python benchmarks/memory.py --out "$out/cpu-memory-$name.json" ;;
    *)
        echo "error: no step $step" >&2
        exit 2
        ;;
    esac
    echo "== $step took $SECONDS s"
done
python scripts/figures.py
