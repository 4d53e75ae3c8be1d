"""What checks ask of Ray: its nodes, and functions that run on one of them; in this process."""


class Cluster:
    """Nodes by their names, one letter from a to f, which are their kinds too; with so many GPUs each."""

    class exceptions:
        class GetTimeoutError(Exception):
            pass

        class RayTaskError(Exception):
            pass

    def __init__(self, **gpus):
        self.gpus, self.asked = gpus, []

    def nodes(self):
        common = {"Alive": True, "Labels": {}}
        return [
            {**common, "NodeID": name * 56, "NodeManagerAddress": name, "Resources": {"CPU": 1, "GPU": gpus, name: 1}}
            for name, gpus in self.gpus.items()
        ]

    def remote(self, scheduling_strategy, **_):
        def asking(question):
            def answer(*given):
                self.asked.append(scheduling_strategy.node_id[:1])
                return question(*given)

            return type("Task", (), {"remote": staticmethod(answer)})

        return asking

    def get(self, answer, timeout):
        return answer
