#!/usr/bin/env bash
# What is to be known of a processor: every precision beside other engines, through TorchServe, and
# what a worker takes. Writes benchmarks/results/cpu-*-NAME.json, then the tables of the pages.
#
#   benchmarks/processor.sh NAME [STEP ...]
#
#   NAME   in the files' names, such as zen3 or amx-2
#   STEP   encoder     BERT-base and MiniLM, ours and other engines in int8, GEMMs in fp32
#          large       the same of BERT-large on sentences, OpenVINO left out
#          gemms       fp32 and bf16 beside the products alone, from one short text on
#          serving     MiniLM through TorchServe, ours in every precision and the published behaviour
#          memory      a worker of BERT-base in every precision
#          default: all but gemms
#
# FT_HANDLER_CPU_ISA picks our instruction set; CT2_FORCE_CPU_ISA and MKL_ENABLE_INSTRUCTIONS that of
# CTranslate2. FOLDER keeps converted models for the next run.
set -euo pipefail
cd "$(dirname "$0")/.."

name=$1
shift
[[ $# -gt 0 ]] || set -- encoder large serving memory
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=benchmarks/results
folder=(${FOLDER:+--folder "$FOLDER"})
others=(ctranslate2_int8 onnxruntime_int8)

# Each of its own name, so that a step can be repeated alone.
encoder() {
    local step=$1
    shift
    python benchmarks/encoder.py --no-plot "${folder[@]}" --out "$out/cpu-precisions-$name$step.json" "$@"
}

for step in "$@"; do
    SECONDS=0
    echo "== $step"
    case $step in
    encoder)
        encoder "" --model base minilm --lengths ragged sst2 squad --batch 16 1 --rounds 3 \
            --columns ours gemms_fp32 "${others[@]}" openvino_int8
        ;;
    large)
        encoder -large --model large --lengths sst2 --batch 1 16 --rounds 3 \
            --columns ours gemms_fp32 "${others[@]}"
        ;;
    gemms)
        encoder -gemms --precisions fp32 bf16 --lengths sst2 --batch 1 2 4 8 16 --columns ours gemms
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
