from promptfed.strategies.aug_pe import AugPE
from tests.contracts.method import MethodContract


class TestContract(MethodContract):
    def method(self) -> AugPE:
        return AugPE()
