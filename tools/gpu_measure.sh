#!/bin/sh
# On a machine with a GPU, from the repository's root: the measurements of docs/performance.md, by part:
#
#     tools/gpu_measure.sh PART ... [requests] [lists] [prefill] [kernels] [startup] [http] [long] [rates] [peer] [swap] [sanitize]
#
# Tables go to the terminal, JSON and pictures to $OUT (default /tmp). WORKLOAD: a JSON list of [prompt tokens, output tokens];
# TRACE: a CSV of arrivals, for `rates`; TOKENIZER: a directory, for `http` and `rates`; SHAPES: those to take, of `quire bench --help`.
set -u
OUT=${OUT:-/tmp}
SHAPES=${SHAPES:-"llama-3.1-8b qwen3-0.6b"}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="${PYTHONPATH:-src}" TOKENIZERS_PARALLELISM=false COLUMNS="${COLUMNS:-150}"
DTYPE=${DTYPE:-bfloat16}
PORT=${PORT:-8000}

bench() { # name of the benchmark, name of its JSON, options
    name=$1 file=$2
    shift 2
    echo "== quire bench $name $*"
    $PYTHON -m quire bench "$name" --json "$OUT/$file.json" "$@"
}

engine() { # a benchmark of the engine, as a peer would be measured: no prefix cache, no swap space
    name=$1 shape=$2
    shift 2
    bench "$name" "$part-$shape" --shape "$shape" --dtype "$DTYPE" --swap-space 0 --no-enable-prefix-caching "$@"
}

serve() { # shape; starts a server, and waits until it is ready
    directory=$OUT/model-$1
    mkdir -p "$directory"
    $PYTHON -c "import json, sys; from quire.bench.shapes import SHAPES; json.dump(SHAPES[sys.argv[1]], sys.stdout)" "$1" \
        >"$directory/config.json"
    $PYTHON -m quire serve "$directory" --load-format dummy --tokenizer "$TOKENIZER" --dtype "$DTYPE" --swap-space 0 \
        --no-enable-prefix-caching --port "$PORT" >"$OUT/serve-$1.log" 2>&1 &
    server=$!
    tries=0
    until $PYTHON -c "import sys, urllib.request as u; u.urlopen(sys.argv[1])" "http://127.0.0.1:$PORT/health" 2>/dev/null; do
        tries=$((tries + 1))
        kill -0 $server 2>/dev/null && [ $tries -lt 300 ] || { tail -n 5 "$OUT/serve-$1.log"; kill $server; return 1; }
        sleep 0.5
    done
}

end_server() {
    kill -INT $server
    wait $server
}

http() { # shape; the list through a server, streamed and not
    serve "$1" || return
    for how in stream no-stream stream no-stream; do
        bench serve "serve-$1-$how" --url "http://127.0.0.1:$PORT" --workload "$WORKLOAD" --prompt-kind ids \
            --endpoint completions --request-rate inf --temperature 0.6 --client-processes "${CLIENTS:-4}" --$how
    done
    end_server
}

rates() { # shape; a trace's requests through a server
    serve "$1" || return
    bench rates "rates-$1" --url "http://127.0.0.1:$PORT" --workload "$TRACE" --temperature 0.6 --first-rate "${FIRST_RATE:-4}" \
        --seconds "${SECONDS_EACH:-20}" --client-processes "${CLIENTS:-4}" --svg "$OUT/rates-$1.svg"
    end_server
}

sanitize() { # name of the log, test file, which of its tests; no graphs: without torch's own allocator they cannot be captured
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$PYTHONPATH:tests timeout -s INT -k 10 "${LIMIT:-500}" \
        compute-sanitizer --tool memcheck $PYTHON -m pytest -q -m gpu -p no:cacheprovider -o filterwarnings=default -o timeout=0 \
        -k "not graph $3" "tests/$2.py" >"$OUT/sanitize-$1.log" 2>&1
}

for part in "$@"; do
    case $part in
    kernels) bench kernels kernels ;;
    swap) bench swap swap ;;
    sanitize) # tests of kernels under the checker of memory accesses; quickest where gpu_check.sh has compiled them before
        sanitize gluon-linear kernels/test_gluon_linear "" &
        sanitize linear kernels/test_linear "" &
        sanitize skinny kernels/test_skinny "" &
        sanitize triton kernels/test_triton "" &
        sanitize attention-float64 attention/test_triton_attention "and float64" &
        sanitize attention-random attention/test_triton_attention "and random" &
        sanitize attention-rest attention/test_triton_attention "and not float64 and not random" &
        sanitize gluon-decode attention/test_gluon_decode "" &
        sanitize gluon-attention attention/test_gluon_attention "and (float64 or random)" &
        sanitize gluon-attention-rest attention/test_gluon_attention "and not float64 and not random" &
        wait
        for log in "$OUT"/sanitize-*.log; do
            echo "== $log"
            grep -v SKIPPED "$log" | tail -n 3 | cut -c1-200
        done ;;
    *)
        for shape in $SHAPES; do
            case $part in
            requests) engine decode "$shape" --temperature 0.6 --input-len 512 --output-len 256 --max-num-seqs 16 --repeat 2 ;;
            lists) engine throughput "$shape" --temperature 0.6 --workload "$WORKLOAD" --repeat 1 --profile --svg "$OUT/step-$shape.svg" ;;
            prefill) engine prefill "$shape" --num-prompts 64 --input-len 2048 --profile ;;
            startup) bench startup "startup-$shape" --shape "$shape" --dtype "$DTYPE" ${STARTUP_OPTIONS:-} ;;
            http) http "$shape" ;;
            long) engine long-prompt "$shape" --prompt-len "${LONG:-128000}" --step-target-ms 50 --max-model-len "$((${LONG:-128000} + 64))" ;;
            rates) rates "$shape" ;;
            peer) engine throughput "$shape" --temperature 0.6 --workload "$WORKLOAD" --repeat 1 --peer transformers --peer-requests 256 ;;
            *) echo "no part is called $part" >&2; exit 2 ;;
            esac
        done ;;
    esac
done
