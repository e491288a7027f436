from promptfed.strategies.fedone_bdpl import FedOneBDPL
from promptfed.strategies.fedone_gs_bdpl import FedOneGSBDPL
from tests.contracts.method import MethodContract


class TestContract(MethodContract):
    def method(self) -> FedOneBDPL:
        return FedOneBDPL()


class TestContractOfTheGumbelVariant(MethodContract):
    def method(self) -> FedOneGSBDPL:
        return FedOneGSBDPL()
