#!/bin/sh
# Runs every golden set in DIR on every mesh, in one process and across two hosts. Prints a line for each.
#   tools/verify/verify_all.sh DIR
set -eu
status=0
for set in "$1"/*/; do
    for mesh in 1x1 1x2 2x2 1x4 1x8; do
        for hosts in 1 2; do
            [ "$mesh$hosts" = 1x12 ] && continue # one device makes one host
            if report=$(.venv/bin/grokmesh verify --checkpoint "$set" --golden "$set" --mesh "$mesh" --hosts "$hosts" 2>/dev/null); then
                result=ok
            else
                result=FAIL
                status=1
            fi
            worst=$(echo "$report" | awk '$1 ~ /^logits/ && $4 + 0 > w { w = $4 + 0 } END { printf "%.1e", w }')
            greedy=$(echo "$report" | awk '$1 ~ /^greedy/ { n++; if ($6 == "100.0%") e++ } END { print e + 0 "/" n + 0 }')
            echo "$result $(basename "$set") mesh $mesh hosts $hosts: worst rms logit error $worst, greedy cases equal $greedy"
        done
    done
done
exit $status
