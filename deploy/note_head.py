"""Notes the head of a `local` cluster in Ray's list of its nodes: note_head.py CLUSTER_CONFIG.

Ray's autoscaler counts the head among the nodes of its type. Unless it finds the head noted, it leaves one worker out.
"""

import pathlib
import sys

import yaml
from ray.autoscaler._private.local.node_provider import LocalNodeProvider, record_local_head_state_if_needed

config = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
record_local_head_state_if_needed(LocalNodeProvider(config["provider"], config["cluster_name"]))
