"""A seeded data set of short-answer extraction: short business notes, each with a question that a part of it answers.

    python -m evaluators.extraction FOLDER [SEED]

Five clients write notes of five kinds. Held-out notes are of templates, and their questions in a wording, that no
training note has; and no name, date, number or thing stands in two of the splits: what is measured is how well a
prompt asks, not what an exemplar happened to say. Public notes are of a sixth kind, and come without answers.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from promptfed.files import write_whole

TRAIN, TEST, PUBLIC = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Templates of notes, the last two held out, and for each slot three wordings of its question, the last held out.

    A slot is ``{kind}`` or ``{kind_role}``, of the kinds that `value` knows.
    """

    notes: tuple[str, ...]
    questions: dict[str, tuple[str, str, str]]


DOMAINS = {
    "appointments": Domain(
        notes=(
            "{person} is booked with {person_staff} on {date} at {time}, {place}. Please bring form {code}.",
            "Reminder for {person}: your visit to {person_staff} is at {time} on {date} in {place}, reference {code}.",
            "On {date} {person_staff} sees {person} in {place}. The slot {code} begins at {time}.",
            "{person} called and asked for {person_staff}; we agreed on {date}, {time}, {place}. Slip {code} was sent.",
            "New in the diary: {time}, {date}. Guest: {person}. Host: {person_staff}. Room: {place}. File: {code}.",
            "We moved {person} to {date}. {person_staff} will wait in {place} from {time} and needs paper {code}.",
        ),
        questions={
            "person": ("Who has the appointment?", "Who is the visitor?", "What is the name of the patient?"),
            "person_staff": (
                "Who will see the visitor?",
                "With whom is the appointment?",
                "Whom will the patient meet?",
            ),
            "date": ("On which day is the appointment?", "What is the date of the visit?", "When is the patient due?"),
            "time": ("At what time does it begin?", "What time is the visit?", "At what hour is the patient due?"),
            "place": ("Where is the appointment?", "In which place is the visit?", "Where should the patient go?"),
        },
    ),
    "bookings": Domain(
        notes=(
            "Booking {code}: {person} travels to {city} on {date}, total {amount}, by {company}.",
            "{company} confirms a trip to {city} for {person}. Leaving on {date}. Price {amount}. Number {code}.",
            "For {amount}, {person} has reserved {city} with {company} from {date}; confirmation {code}.",
            "{person} paid {amount} to {company}. Trip: {city}, starting {date}. Ticket {code}.",
            "Itinerary {code} by {company}. Traveller {person} goes to {city}; departure {date}, fare {amount}.",
            "Please hold {city} for {person}: first night {date}, rate {amount}, agent {company}, voucher {code}.",
        ),
        questions={
            "person": ("Who travels?", "Who made the booking?", "What is the name of the guest?"),
            "city": ("Where does the trip go?", "Which city is booked?", "What is the destination?"),
            "date": ("On which day does the trip start?", "What is the travel date?", "When does the guest leave?"),
            "amount": ("How much does the trip cost?", "What is the price?", "What does the guest pay?"),
            "code": ("What is the booking number?", "Which number does the booking have?", "What is the reference?"),
        },
    ),
    "deliveries": Domain(
        notes=(
            "Parcel {code} with {things} left {city} on {date} and goes to {person}. Carrier: {company}.",
            "{company} will bring {things} to {person} on {date}. The parcel {code} comes from {city}.",
            "From {city}: {things} for {person}, arriving {date}, tracking {code}, with {company}.",
            "Delivery of {things} to {person} is planned for {date}. {company} took parcel {code} in {city}.",
            "{person} expects {things}. Our depot in {city} gave consignment {code} to {company} for {date}.",
            "Shipment {code}, {things}, was picked up in {city}; {company} hands it to {person} on {date}.",
        ),
        questions={
            "things": ("What is in the parcel?", "What is being delivered?", "Which goods are sent?"),
            "city": ("From where does the parcel come?", "In which city was it sent?", "Where was it picked up?"),
            "person": ("Who gets the parcel?", "To whom does it go?", "Who is the receiver?"),
            "date": ("On which day does the parcel travel?", "What is the date?", "When is the shipment?"),
            "company": ("Who carries the parcel?", "Which company brings it?", "Who is the carrier?"),
        },
    ),
    "invoices": Domain(
        notes=(
            "Invoice {code} from {company} of {date} is due on {date_due}; the total is {amount}. Contact: {person}.",
            "{company} sent invoice {code} on {date}. We owe {amount} by {date_due}. Questions go to {person}.",
            "We received bill {code} ({date}) of {company} over {amount}. {person} has to pay it until {date_due}.",
            "{person} approved {amount} for {company}. Invoice {code} is from {date}, payable by {date_due}.",
            "Open item {code}: {company}, {amount}, issued {date}, deadline {date_due}, handled by {person}.",
            "On {date} {company} billed us {amount} under {code}. Transfer before {date_due}, says {person}.",
        ),
        questions={
            "company": ("Who sent the invoice?", "Which company is to be paid?", "Who is the supplier?"),
            "date_due": ("When is the payment due?", "Until when must it be paid?", "What is the deadline?"),
            "amount": ("How much has to be paid?", "What is the total?", "What sum is owed?"),
            "code": (
                "What is the invoice number?",
                "Which number does the invoice have?",
                "What is the bill's number?",
            ),
            "person": ("Who deals with the invoice?", "Who is our contact?", "Whose task is the payment?"),
        },
    ),
    "tickets": Domain(
        notes=(
            "Ticket {code}: {person} in {city} reports trouble with {things} since {date}. Assigned to {person_staff}.",
            "{person_staff} looks after {code}. {person} wrote on {date} that {things} failed in {city}.",
            "Since {date} {things} stopped working at our office in {city}, says {person}. {person_staff} has {code}.",
            "{person} opened {code} on {date} about {things} in {city}; {person_staff} will call back.",
            "Case {code}, {date}, {city}. Caller: {person}. Subject: {things}. Engineer: {person_staff}.",
            "Please help {person}: {things} broke in {city} on {date}. {person_staff} owns request {code}.",
        ),
        questions={
            "person": ("Who reports the problem?", "Who opened the ticket?", "Who needs help?"),
            "person_staff": ("Who works on the ticket?", "To whom is it assigned?", "Who will solve the problem?"),
            "things": ("What does not work?", "What is the trouble with?", "Which equipment is affected?"),
            "city": ("In which city is the problem?", "Where did it happen?", "Which office is affected?"),
            "code": ("What is the ticket number?", "Which number does the ticket have?", "How is the case numbered?"),
        },
    ),
}
NOTICES = Domain(
    notes=(
        "{company} opens a new shop in {city} on {date}. The first visitors get {things}. Ask for {person}.",
        "Lost in {city} on {date}: {things}. Please call {person}, who offers {amount}.",
        "{person} won {amount} in the raffle of {company}. The prize was given in {city} on {date}.",
        "The meeting of {company} begins at {time} on {date}. {person} speaks in {city} about {things}.",
        "The town of {city} spends {amount} on {things}. {person} signed the contract with {company} on {date}.",
        "Wanted by {company}: {things}, in good order. Write to {person} in {city} before {date}.",
    ),
    questions={
        "company": ("Which company is named?", "Which firm is it about?", "Which business is it?"),
        "city": ("Which city is named?", "Where is it?", "In which town is it?"),
        "date": ("On which day is it?", "What is the date?", "When is it?"),
        "person": ("Which person is named?", "Who is named?", "Whose name is given?"),
        "things": ("Which things are named?", "What is it about?", "Which goods are named?"),
        "amount": ("How much money is it?", "What is the sum?", "Which amount is named?"),
    },
)


def _list(values: str) -> list[str]:
    return [value.strip() for value in values.split(",")]


FIRST_NAMES = _list(
    "Ada, Boris, Clara, Daniel, Elena, Felix, Greta, Henry, Irene, Jonas, Karin, Leon, Maria, Nadia, Oscar, Paula, "
    "Quentin, Rosa, Simon, Tamara, Ulrich, Vera, Walter, Xenia, Yusuf, Zoe, Amir, Beatriz, Cyril, Dora, Emil, "
    "Fatima, Goran, Hanna, Igor, Julia, Kamal, Lucia, Marko, Nora, Olaf, Petra"
)
LAST_NAMES = _list(
    "Abbott, Berger, Castillo, Dvorak, Eklund, Ferrari, Gruber, Haddad, Ivanov, Jansen, Keller, Lindgren, Moreau, "
    "Novak, Okafor, Petrov, Quist, Rossi, Schmidt, Tanaka, Ueda, Vargas, Weber, Xu, Yilmaz, Zeman, Arslan, Brandt, "
    "Costa, Duval, Engel, Fontana, Garcia, Horvath, Iversen, Jovanovic, Kowalski, Laurent, Meyer, Nilsen, Olsen, "
    "Pereira"
)
CITIES = _list(
    "Aarhus, Bergen, Cordoba, Dresden, Exeter, Florence, Ghent, Haifa, Izmir, Jena, Krakow, Leeds, Malaga, Nantes, "
    "Odense, Porto, Rennes, Seville, Turin, Utrecht, Valencia, Vilnius, Warsaw, York, Zurich, Bologna, Cardiff, "
    "Delft, Erfurt, Galway, Graz, Lugano, Lyon, Riga, Split, Tallinn"
)
FIRMS = _list(
    "Amber, Birch, Cobalt, Delta, Ember, Falcon, Garnet, Harbour, Indigo, Juniper, Kestrel, Lantern, Meridian, "
    "Nimbus, Orchard, Pioneer, Quarry, Raven, Summit, Tidewater, Umber, Vertex, Willow, Yonder, Zenith, Alder, "
    "Basalt, Cedar, Dune, Elm, Fjord, Grove, Hazel"
)
TRADES = _list("Foods, Logistics, Media, Paper, Tools, Textiles, Travel, Power, Glass")
THINGS = _list(
    "two desk lamps, the label printer, six office chairs, a coffee machine, the door scanner, ten steel shelves, a "
    "water pump, the card reader, four garden benches, a projector, the heating unit, three bicycles, a film "
    "camera, the time clock, nine oak boards, a sewing machine, the fire alarm, five toner boxes, a piano stool, "
    "the cooling fan, twelve mugs, a tent, the copper pipes, seven keyboards, a drill press, the lift, eight window "
    "frames, a weather station, the ice maker, forty bricks"
)
PLACES = [f"{kind} {n}" for kind in ("room", "ward", "desk") for n in range(1, 40)]


def value(slot: str, split: int, rng: np.random.Generator) -> str:
    """A value for ``slot`` that can stand in notes of this ``split`` only: every third of all there are."""

    def number(low: int, high: int) -> int:
        return int(rng.integers(low // 3, high // 3)) * 3 + split

    def one(values: Sequence[str]) -> str:
        mine = values[split::3]
        return mine[int(rng.integers(len(mine)))]

    kind, _, role = slot.partition("_")
    match kind:
        case "person":
            return f"{one(FIRST_NAMES)} {one(LAST_NAMES)}"
        case "company":
            return f"{one(FIRMS)} {TRADES[int(rng.integers(len(TRADES)))]}"
        case "date":
            day = date(2024, 1, 1) + timedelta(days=number(0, 540) + 540 * (role == "due"))
            return f"{day.day} {day:%B} {day.year}"
        case "amount":
            return f"{number(120, 9000):,} euros"
        case "code":
            return f"{'ABCDEFGHKLMNPRSTUVWXYZ'[int(rng.integers(22))]}-{number(10_000, 99_999)}"
        case "time":
            minute = number(0, 108) * 5
            return f"{8 + minute // 60}:{minute % 60:02d}"
        case "city":
            return one(CITIES)
        case "place":
            return one(PLACES)
        case _:
            return one(THINGS)


def note(domain: Domain, split: int, rng: np.random.Generator) -> tuple[str, str]:
    """A note with its question behind it, and the answer, which stands in the note once."""
    templates = domain.notes[-2:] if split == TEST else domain.notes if split == PUBLIC else domain.notes[:-2]
    template = templates[int(rng.integers(len(templates)))]
    slots = re.findall(r"{(\w+)}", template)
    while True:
        filled = {slot: value(slot, split, rng) for slot in slots}
        text = template.format_map(filled)
        if all(text.count(each) == 1 for each in filled.values()):
            break
    asked = [slot for slot in slots if slot in domain.questions]
    slot = asked[int(rng.integers(len(asked)))]
    wordings = domain.questions[slot]
    question = wordings[2] if split == TEST else wordings[int(rng.integers(3 if split == PUBLIC else 2))]
    return f"{text[0].upper()}{text[1:]} {question}", filled[slot]


def rows(split: int, n: int, seed: int) -> list[tuple[str, str, str]]:
    """``n`` rows (client, text, answer) of each client, no text twice; more of them begin like fewer."""
    out = []
    for number, (client, domain) in enumerate(DOMAINS.items()):
        out += [(client, *pair) for pair in _different(domain, split, n, np.random.default_rng([seed, number, split]))]
    return out


def public_texts(n: int, seed: int) -> list[str]:
    """``n`` notices with a question, which belong to nobody; without answers."""
    return [text for text, _ in _different(NOTICES, PUBLIC, n, np.random.default_rng([seed, len(DOMAINS), PUBLIC]))]


def _different(domain: Domain, split: int, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        text, answer = note(domain, split, rng)
        pairs.setdefault(text, answer)
    return list(pairs.items())


def write(folder: Path, *, seed: int = 1, n_train: int = 60, n_test: int = 30, n_public: int = 60) -> None:
    """Write train.csv.gz, test.csv.gz (client, text, answer; ``n_train`` and ``n_test`` a client) and public.csv.gz
    (text)."""
    header = ["client", "text", "answer"]
    tables = {
        "train": [header, *map(list, rows(TRAIN, n_train, seed))],
        "test": [header, *map(list, rows(TEST, n_test, seed))],
        "public": [["text"], *([text] for text in public_texts(n_public, seed))],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        content = io.StringIO(newline="")
        csv.writer(content, lineterminator="\n").writerows(table)
        write_whole(folder / f"{name}.csv.gz", gzip.compress(content.getvalue().encode(), mtime=0))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
