#!/bin/sh
# Starts PostgreSQL the way the well-known image does: POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB and
# PGDATA say what to create when the data directory is empty; arguments go to the server.
# Not PID 1: the kernel shields PID 1 of a container from SIGSTOP, and tests freeze the server.
set -eu

if [ $# -gt 0 ] && [ "$1" != postgres ] && [ "${1#-}" = "$1" ]; then
    exec "$@"
fi
[ "${1:-}" != postgres ] || shift

user=${POSTGRES_USER:-postgres}
database=${POSTGRES_DB:-$user}
export PGDATA=${PGDATA:-/var/lib/postgresql/data/pgdata}
unfinished=$PGDATA.unfinished

if [ -e "$unfinished" ]; then
    echo "the last initialisation was interrupted: starting over"
    rm -rf "$PGDATA"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    if [ -z "${POSTGRES_PASSWORD:-}" ]; then
        echo "POSTGRES_PASSWORD is not set: connections over TCP need one" >&2
        exit 1
    fi
    mkdir -p "$(dirname "$PGDATA")"
    : > "$unfinished"
    secret=$(mktemp /tmp/password.XXXXXX)
    printf '%s\n' "$POSTGRES_PASSWORD" > "$secret"
    initdb --username="$user" --pwfile="$secret" --auth-local=trust --auth-host=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 --no-sync --no-instructions
    rm -f "$secret"
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    if [ "$database" != postgres ]; then
        printf 'CREATE DATABASE "%s"\n' "$database" | postgres --single -j -D "$PGDATA" postgres > /dev/null
    fi
    rm -f "$unfinished"
fi
unset POSTGRES_PASSWORD

postgres -c listen_addresses='*' "$@" &
server=$!
# SIGINT is PostgreSQL's fast shutdown: it ends connections instead of waiting for them.
trap 'kill -INT $server' TERM INT
trap 'kill -HUP $server' HUP
status=0
wait $server || status=$?
# A trapped signal ends `wait` early; the server may still be shutting down.
while kill -0 $server 2> /dev/null; do
    status=0
    wait $server || status=$?
done
exit $status
