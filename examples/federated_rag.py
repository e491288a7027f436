"""Three organisations keep their documents; a question finds the right ones, and the model answers from them.

    pip install 'promptfed[langchain,models]'
    python examples/federated_rag.py [runs/NAME]

With the folder of a run whose task was generation, the prompt is the one that the run tuned; without, one by hand.
"""

from __future__ import annotations

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableLambda

import promptfed
from promptfed.federation.inprocess import InProcessTransport
from promptfed.langchain import FMChatModel, prompt_template
from promptfed.prompts.passages import fitting, grounded
from retrieval.documents import Document
from retrieval.encoder import SentenceEncoder
from retrieval.federated import FederatedRetriever
from retrieval.index import LocalIndex
from retrieval.langchain import PromptfedRetriever
from retrieval.owner import IndexOwner, Policy

DOCUMENTS = {
    "personnel": {
        "leave": "Leave: all staff have thirty days of paid leave a year, and five days for the care of a child.",
        "pay": "Pay: wages are paid on the 25th of each month, to the account that personnel has on file.",
    },
    "buildings": {
        "fire": "Fire: leave by the stairs, not by the lift, and meet in the car park behind house B.",
        "keys": "Keys: lost keys are reported to the porter, telephone 4711, on the same day.",
    },
    "clinic": {
        "fever": "Fever: children with a fever of 39 degrees or more are seen on the same day.",
        "flu": "Flu: vaccination is offered from October on, without an appointment, on Tuesdays. Bring your card.",
    },
}
BY_HAND = promptfed.PromptTemplate(text="Question: {text}\nShort answer:", words=())


def owners(encoder: SentenceEncoder) -> dict[str, IndexOwner]:
    """Each owner has an index of its own. The clinic shows no more than the beginning of a passage."""
    policies = {"clinic": Policy(shares="snippets", snippet_words=12)}
    out = {}
    for name, texts in DOCUMENTS.items():
        index = LocalIndex(encoder)
        index.add(Document(doc_id=doc_id, text=text) for doc_id, text in texts.items())
        out[name] = IndexOwner(name, index, policies.get(name, Policy(shares="documents")))
    return out


def main() -> None:
    prompt = promptfed.Prompt.load(sys.argv[1]).prompts[0] if len(sys.argv) > 1 else BY_HAND
    encoder = SentenceEncoder()
    parties = owners(encoder)
    # All three are asked: the noise that hides one document hides all of an index that has two. With many owners, and
    # hundreds of documents at each, n_ask sends a question to the few that are likely to know.
    federated = FederatedRetriever(InProcessTransport(parties), list(parties), encoder)
    retriever = PromptfedRetriever(retriever=federated, k=1)

    def ask(question: str) -> PromptValue:
        """The tuned prompt, with what was found for this question in it."""
        found = retriever.invoke(question)
        for document in found:
            print(f"  {document.metadata['owner']}/{document.id}: {document.page_content}")
        passages = fitting([document.page_content for document in found], 200)
        return prompt_template(grounded(prompt, passages)).invoke({"text": question})

    model = FMChatModel(fm="embedded:smollm2-135m-instruct", raw=True, max_tokens=16, stop=("\n",))
    chain = RunnableLambda(ask) | model | StrOutputParser()
    for question in (
        "How many days of leave do I have?",
        "Whom do I tell that I lost my keys?",
        "When do I get a flu shot?",
    ):
        print(question)
        print(f"  -> {chain.invoke(question)}")


if __name__ == "__main__":
    main()
