#!/usr/bin/env bash
# Copy store and history of the project in this folder, also while it is in use:
#   deploy/backup.sh backup TARGET      # TARGET must not exist
#   deploy/backup.sh restore TARGET     # into a project whose .ft/store and history do not exist (Postgres: an empty database)
# DAGSTER_HOME and FT_STORE as set, else .ft/dagster and .ft/store. With FT_POSTGRES_URL the history is the database's, by pg_dump and
# pg_restore. A store on s3:// or gs:// is not copied here: its bucket's own versioning does that (FT_STORE=none).
set -euo pipefail
what=${1:?backup or restore} target=${2:?a folder}
home=${DAGSTER_HOME:-.ft/dagster} store=${FT_STORE:-.ft/store}
postgres=${FT_POSTGRES_URL:-} postgres=${postgres/+psycopg2/}
python=${PYTHON:-.venv/bin/python}

case $what in
backup)
  mkdir "$target"
  # The history first: a store that is newer than it loses nothing, a history of artifacts that are not there would.
  if [ -n "$postgres" ]; then
    pg_dump --format=custom --file="$target/history.dump" "$postgres"
  else
    tar -C "$home" --exclude='*.db' --exclude='*.db-*' -cf "$target/home.tar" .
    (cd "$home" && find . -name '*.db' -print0) | while IFS= read -r -d '' file; do
      mkdir -p "$target/home/$(dirname "$file")"
      # SQLite's own copy: the file alone, taken while somebody writes, may be torn.
      "$python" -c 'import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))' "$home/$file" "$target/home/$file"
    done
  fi
  if [ "$store" != none ]; then
    # Published versions never change; what is being made has a name of its own and is left out. "File changed" is CURRENT's rename.
    tar -C "$store" --exclude='.tmp-*' --exclude='.work' -cf "$target/store.tar" . || [ $? = 1 ]
  fi
  ;;
restore)
  if [ "$store" != none ]; then
    [ ! -e "$store" ] || { echo "$store exists: move it away first" >&2; exit 2; }
    mkdir -p "$store" && tar -C "$store" -xf "$target/store.tar"
  fi
  if [ -n "$postgres" ]; then
    pg_restore --exit-on-error --no-owner --dbname="$postgres" "$target/history.dump"
  else
    [ ! -e "$home/history" ] || { echo "$home holds a history: move it away first" >&2; exit 2; }
    mkdir -p "$home" && tar -C "$home" -xf "$target/home.tar" && cp -a "$target/home/." "$home/"
  fi
  ;;
*) echo "usage: deploy/backup.sh backup|restore TARGET" >&2; exit 2 ;;
esac
