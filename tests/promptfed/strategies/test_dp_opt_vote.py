from promptfed.strategies.dp_opt_vote import DPOPTVote
from tests.contracts.method import MethodContract


class TestContract(MethodContract):
    def method(self) -> DPOPTVote:
        return DPOPTVote()
