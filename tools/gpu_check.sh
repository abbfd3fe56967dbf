#!/bin/sh
# On a machine with a GPU, from the repository's root: the GPU tests of kernels and engine, then time per decoded token with
# graphs and without. About five minutes, all steps under a time limit. Logs go to $OUT (default /tmp).
#
# The golden answers are needed beside the repository, at ../shared/data/models/stories260K; a copy that was carried along in
# .pocket/stories260K is put there.
set -u
OUT=${OUT:-/tmp}
export PYTHONPATH=src:tests TOKENIZERS_PARALLELISM=false
if [ -d .pocket/stories260K ] && [ ! -d ../shared/data/models/stories260K ]; then
    mkdir -p ../shared/data/models && cp -r .pocket/stories260K ../shared/data/models/
fi

run_tests() { # name, tests
    name=$1
    shift
    timeout -s INT -k 10 200 python3 -m pytest -q -m gpu --tb=short --maxfail=8 -o filterwarnings=default -p no:cacheprovider \
        --durations=3 "$@" >"$OUT/$name.log" 2>&1
}
# The most of it is compiling, so processes share the tests of one file.
run_tests kernels tests/kernels --ignore tests/kernels/test_gluon_linear.py &
run_tests gluon-linear tests/kernels/test_gluon_linear.py &
run_tests engine tests/engine/test_gpu.py tests/engine/test_gpu_few_tokens.py tests/worker/test_host_memory.py &
run_tests logits tests/engine/test_bf16_logits.py &
run_tests triton tests/attention/test_triton_attention.py -k "float64" &
run_tests triton-random tests/attention/test_triton_attention.py -k "random" &
run_tests triton-rest tests/attention/test_triton_attention.py -k "not float64 and not random" &
run_tests gluon-decode tests/attention/test_gluon_decode.py &
run_tests gluon tests/attention/test_gluon_attention.py -k "float64 or random" &
run_tests gluon-rest tests/attention/test_gluon_attention.py -k "not float64 and not random" &
wait
for name in kernels gluon-linear engine logits triton triton-random triton-rest gluon-decode gluon gluon-rest; do
    echo "== $name"
    tail -n 12 "$OUT/$name.log" | cut -c1-180
done

for shape in qwen3-0.6b llama-3.1-8b; do
    echo "== $shape"
    COLUMNS=150 timeout -s INT -k 10 50 python3 -m quire bench decode --shape $shape --dtype bfloat16 --max-num-seqs 16 --swap-space 0 \
        --input-len 512 --output-len 256 --repeat 2 --json "$OUT/decode-$shape.json" >"$OUT/decode-$shape.log" 2>&1
    tail -n 45 "$OUT/decode-$shape.log" | cut -c1-200
done
