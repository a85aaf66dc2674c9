#!/bin/sh
# --version and doctor answer; anything else is run as it is, which is what Kubeflow gives.
case "${1:-doctor}" in
    --version | doctor) exec python3 -m rlhf_ppo "${1:-doctor}" ;;
esac
exec "$@"
