#!/usr/bin/env bash
# The demo's models in TorchServe: answers to a few questions over HTTP, then everything stops.
set -euo pipefail
cd "$(dirname "$0")/.."

port=${PORT:-8080}
inference=http://127.0.0.1:$port
management=http://127.0.0.1:$((port + 1))
metrics=http://127.0.0.1:$((port + 2))

scripts/models.sh

echo "== starting TorchServe with sentiment; the others follow through the management API"
# Authorization off and the model API on: this server lives for a minute, on loopback.
ft-handler serve --models sentiment.mar --no-token-auth --enable-model-api \
    --port "$port" --grpc-port "${GRPC_PORT:-7070}" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

# ready MODEL: whether all its workers are.
ready() {
    curl -sf "$management/models/$1" 2>/dev/null | python -c '
import json, sys
workers = json.load(sys.stdin)[0]["workers"]
sys.exit(not workers or any(w["status"] != "READY" for w in workers))' 2>/dev/null
}

for _ in $(seq 240); do
    if ready sentiment; then break; fi
    kill -0 "$server" 2>/dev/null || { echo "error: the server did not start" >&2; exit 1; }
    sleep 0.5
done

# show COMMAND...: print it as one would type it, then run it.
show() {
    printf '$'
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:@=+-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "$word"; fi
    done
    printf '\n'
    "$@"
    echo
}

ask() { show curl -sSf "$@"; }
say() { printf '\n== %s\n' "$1"; }

ask -X POST "$management/models?url=qa.mar&initial_workers=1&synchronous=true"
ask -X POST "$management/models?url=embeddings.mar&initial_workers=1&synchronous=true"

say "plain text"
ask "$inference/predictions/sentiment" -H 'Content-Type: text/plain' \
    --data 'A warm, funny film that never outstays its welcome.'

say "JSON, with every label's score"
ask "$inference/predictions/sentiment" -H 'Content-Type: application/json' \
    --data '{"text": "The plot goes nowhere and takes two hours to get there.", "top_k": 2}'

say "a pair: a question and its context"
ask "$inference/predictions/qa" -H 'Content-Type: application/json' --data '{
  "question": "Who designed the bridge?",
  "context": "The old iron bridge over the harbour was designed by Ada Lindqvist and opened in 1889."
}'

say "a list: one answer an element, in its order"
ask "$inference/predictions/sentiment" -H 'Content-Type: application/json' \
    --data '["Great fun.", "I want those ninety minutes back.", "The actors are fine, the dialogue is not, and the ending, which the whole town had guessed by the first scene, takes half an hour."]'

say "a vector of a text, as OpenAI's clients ask for it, cut to four dimensions"
ask "$inference/predictions/embeddings" -H 'Content-Type: application/json' \
    --data '{"input": "The ferry leaves every hour.", "model": "all-MiniLM-L6-v2", "dimensions": 4}'

say "one bad request: refused alone"
show curl -sS "$inference/predictions/sentiment" -H 'Content-Type: application/json' \
    --data '{"txt": "wrong key"}'

say "padding avoided"
sleep 2 # workers report once a second
curl -sSf "$metrics/metrics" | python scripts/padding_avoided.py
echo
