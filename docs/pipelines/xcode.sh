#!/bin/bash
# A Run Script phase, before Compile Sources:  "$SRCROOT/xcode.sh"
# Input files: $(SRCROOT)/model/manifest.json, $(SRCROOT)/gates.toml
# Output file: $(DERIVED_FILE_DIR)/dkm.xml
# Xcode then runs it only when an input changed. Its sandbox for scripts has to be off
# (ENABLE_USER_SCRIPT_SANDBOXING = NO): Python reads more than the declared inputs.
set -u

# Xcode does not see the PATH of your shell: name the program here, or in a build setting DKM.
dkm="${DKM:-$SRCROOT/.venv/bin/dkm}"
if [ ! -x "$dkm" ]; then
    echo "error: $dkm is not there: install dkm-export, or set DKM in the build settings"
    exit 4
fi

# Errors, and notes of runtimes that did not run, appear in Xcode's issue navigator.
# The script ends with the exit code of dkm, and any but 0 ends the build.
exec "$dkm" check "$SRCROOT/model" \
    --gates "$SRCROOT/gates.toml" \
    --junit "$DERIVED_FILE_DIR/dkm.xml" --force \
    --format xcode --quiet
