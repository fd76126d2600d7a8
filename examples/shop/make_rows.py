"""Writes train.jsonl and heldout.jsonl: a shop's free-text requests, each answered by one JSON object.

    python examples/shop/make_rows.py

A row is a chat: the request says what is wanted (one of six actions), an order number and an item, between
pleasantries and facts that do not matter (dates, prices, other numbers). The answer copies the order number and the
item as they stand. No two rows share an order number or an item, so the held-out rows can't be answered from memory;
half of them also use wordings that training never shows.
"""

import json
import random
import re
from pathlib import Path

SYSTEM = "Answer with a JSON object: action, order, item."

# action -> wordings; the last four of each are kept for the held-out rows
WORDINGS = {
    "return": [
        "I want to return the {item} from order {order}",
        "please arrange a return of my {item}, order {order}",
        "order {order}: the {item} goes back to you",
        "how do I send back the {item} I got with {order}?",
        "the {item} (order {order}) isn't for me, I'd like to return it",
        "I'm returning one {item}, order no. {order}",
        "return label for order {order} please, it's the {item}",
        "can the {item} be returned? My order is {order}",
        "need to send the {item} back, order {order}",
        "returning: {item}. order: {order}",
        "I'd like to give back the {item}, order {order}",
        "{order} is the order, the {item} is what I am sending back",
        "could you collect the {item} of order {order}? I wish to return it",
        "open a return for {order}, please: the {item}",
    ],
    "cancel": [
        "please cancel order {order}, the {item}",
        "I want to cancel the {item}, order number {order}",
        "cancel my {item} ({order})",
        "don't ship the {item} from order {order}, I am cancelling it",
        "can I still cancel {order}? It was for the {item}",
        "order {order} has to be cancelled, I no longer need the {item}",
        "I changed my mind about the {item}, cancel order {order}",
        "kindly call off the order of the {item}, {order}",
        "is it too late to cancel the {item}? The order is {order}",
        "stop order {order}: I won't need the {item}",
        "I'd like to withdraw order {order} for the {item} before it ships",
        "cancelling {order}, that is the {item}",
        "take the {item} off your list, order {order} is cancelled",
        "would you cancel the {item} that I ordered under {order}?",
    ],
    "track": [
        "where is my {item}? order {order}",
        "please track order {order}, the {item}",
        "when will the {item} arrive? Order number {order}",
        "any news on the delivery of order {order}? It's the {item}",
        "tracking for {order} please, the {item}",
        "I'm still waiting for the {item} of order {order}, where is it?",
        "has my {item} shipped yet? The order is {order}",
        "can you tell me where order {order} with the {item} is now?",
        "status of the {item}? {order}",
        "I'd like to follow the parcel with the {item}, order {order}",
        "order {order} hasn't arrived, where has the {item} got to?",
        "how far along is the {item}? It is order {order}",
        "give me the tracking of the {item}, order {order}",
        "did the {item} leave your warehouse? I mean order {order}",
    ],
    "exchange": [
        "I want to exchange the {item} from order {order}",
        "can I swap the {item} for another one? Order {order}",
        "order {order}: please exchange the {item} for a bigger one",
        "exchange request, {item}, {order}",
        "the {item} from {order} is the wrong size, please swap it",
        "I'd rather have another model than the {item}, could you exchange it? It's order {order}",
        "please replace the {item} of order {order} with a smaller one",
        "is an exchange possible for the {item} ({order})?",
        "swap my {item}, order no. {order}",
        "got the wrong model, exchange the {item} in order {order} please",
        "could I trade the {item} of order {order} for another size?",
        "for order {order} I need an exchange, the {item} doesn't fit",
        "please swap what I got with {order}, the {item}, for a different one",
        "an exchange of the {item} is what I'm after, order {order}",
    ],
    "refund": [
        "I want a refund for the {item}, order {order}",
        "please refund order {order}, the {item}",
        "I'd like my money back for the {item} from order {order}",
        "when do I get the refund for the {item}? Order number {order}",
        "refund {order} ({item})",
        "pay me back for the {item}, order {order}",
        "you charged me twice for the {item}, refund order {order}",
        "order {order}: no refund so far for the {item}",
        "could the {item} be refunded? It was order {order}",
        "the money for the {item} of {order} should be refunded to my card",
        "please give me my money back, {order} was the {item}",
        "I'm owed a refund on the {item}, that's order {order}",
        "reimburse me for order {order}, the {item}",
        "asking for a refund: order {order}, one {item}",
    ],
    "repair": [
        "the {item} from order {order} needs a repair",
        "can you repair my {item}? Order {order}",
        "please fix the {item}, order number {order}",
        "order {order}: the {item} broke, I'd like it repaired",
        "repair for {order}, the {item}",
        "my {item} is damaged, could you mend it? It's order {order}",
        "who can fix the {item} I bought under {order}?",
        "I need the {item} of order {order} fixed",
        "the {item} ({order}) stopped working, please repair it",
        "send someone to repair the {item}, order {order}",
        "is a repair of the {item} covered? The order was {order}",
        "I'd like the {item} mended, order {order}",
        "get order {order} fixed please, the {item} came apart",
        "booking a repair, order {order}, {item}",
    ],
}
UNSEEN = 4

OPENINGS = ["Hi, ", "Hello, ", "Hey, ", "Good morning, ", "Good evening. ", "Dear team, ", "Hi there! "]
OPENINGS += ["Sorry to bother you, "]
CLOSINGS = [" Thanks!", " Thank you.", " thx", " Cheers", " Please hurry."]
CLOSINGS += [" Best wishes, {name}", " Regards, {name}", " {name}"]
NAMES = ["Ada", "Bruno", "Chidi", "Dora", "Emre", "Freya", "Goran", "Hana", "Ines", "Jonas", "Kavya", "Leo", "Mina"]
FACTS = [
    "I paid {price} euros.",
    "It cost {price}.",
    "I ordered on {date}.",
    "It was due on {date}.",
    "The parcel weighs {small} kg.",
    "My customer number is {number}.",
    "My card ends in {four}.",
    "Call me on 0{number} if needed.",
    "I live at {small} Mill Lane.",
    "This is my mail number {small} about it.",
    "The voucher SAVE{small} was used.",
]
STORIES = [
    "I have been a customer for {small} years and was always happy.",
    "It was meant as a present for my sister, who turns {small} on {date}.",
    "We moved house on {date} and everything is upside down.",
    "I spoke to your colleague {name} on {date} and heard nothing since.",
    "Your website asked me to write to you, so here I am.",
    "I looked through the help pages for {small} minutes without luck.",
]
MONTHS = ["January", "March", "April", "June", "July", "September", "October", "December"]

COLOURS = ["blue", "red", "green", "black", "white", "grey", "yellow", "purple", "orange", "pink", "turquoise", "beige"]
HARD = ["kettle", "desk lamp", "teapot", "watering can", "bread bin", "coat hook", "clock", "toaster", "mug", "pan"]
HARD += ["soap dish", "bicycle bell", "letter box", "flower pot"]
SOFT = ["scarf", "blanket", "cushion", "rug", "jacket", "apron", "tablecloth", "hat", "curtain", "bedspread", "towel"]
SOFT += ["laptop sleeve", "oven glove", "shoulder bag"]
WOOD = ["bookshelf", "stool", "chair", "side table", "tray", "picture frame", "bench", "desk", "crate"]
WOOD += ["chopping board"]
MATERIALS = {
    "steel": HARD, "copper": HARD, "enamel": HARD, "ceramic": HARD,
    "wool": SOFT, "linen": SOFT, "cotton": SOFT, "velvet": SOFT,
    "oak": WOOD, "bamboo": WOOD, "walnut": WOOD, "pine": WOOD,
}  # fmt: skip
ITEMS = [f"{colour} {noun}" for colour in COLOURS for noun in HARD + SOFT + WOOD]
ITEMS += [f"{material} {noun}" for material, nouns in MATERIALS.items() for noun in nouns]


def order_number(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHKLMNPQRSTVWXZ", k=3))
    digits = "".join(rng.choices("0123456789", k=8))
    return rng.choice(
        [
            f"{letters[0]}-{digits[:5]}",
            f"{letters[:2]}{digits[:6]}",
            f"{letters}-{digits[:4]}",
            f"{digits[:3]}-{digits[3:6]}",
            f"2026/{digits[:5]}",
            f"{rng.randint(1, 9)}{digits[:6]}",
            f"{digits[:4]}-{letters[:2]}",
        ]
    )


def mistype(text: str, rng: random.Random) -> str:
    """Swap two neighbouring letters inside one or two of the longer words; the {fields} stay."""
    words = [m.span() for m in re.finditer(r"(?<![\w{'])[A-Za-z]{4,}(?![\w}'])", text)]
    for start, end in rng.sample(words, min(len(words), rng.randint(1, 2))):
        i = rng.randrange(start + 1, end - 2)
        text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text


def fill(text: str, rng: random.Random) -> str:
    """Fill in the facts that don't matter, leaving {order} and {item}."""
    return text.format(
        order="{order}",
        item="{item}",
        name=rng.choice(NAMES),
        price=f"{rng.randint(5, 180)}.{rng.choice(['00', '50', '90', '99'])}",
        date=f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        small=rng.randint(2, 60),
        number=rng.randint(10000, 99999),
        four=rng.randint(1000, 9999),
    )


def request(wording: str, rng: random.Random) -> str:
    """One wording in one of five voices, with {order} and {item} still to be filled in."""
    voice = rng.choice(["plain", "polite", "curt", "hasty", "long-winded"])
    if voice == "curt":
        return wording.lower()
    parts = [wording if wording.endswith("?") else wording + "."]
    if voice == "long-winded":
        parts.insert(rng.randint(0, 1), fill(rng.choice(STORIES), rng))
    elif rng.random() < 0.6:
        parts.insert(rng.randint(0, 1), fill(rng.choice(FACTS), rng))
    text = " ".join(part[0].upper() + part[1:] for part in parts)
    if voice != "plain" or rng.random() < 0.3:
        opening = rng.choice(OPENINGS)
        keeps_capital = opening.endswith(("! ", ". ")) or text.startswith(("I ", "I'"))
        text = opening + (text if keeps_capital else text[0].lower() + text[1:])
    if voice != "plain":
        text += fill(rng.choice(CLOSINGS), rng)
    if voice == "hasty":
        text = mistype(text.lower() if rng.random() < 0.5 else text, rng)
    return text


def row(action: str, wording: str, order: str, item: str, rng: random.Random) -> dict:
    shown = f"#{order}" if rng.random() < 0.15 else order
    answer = json.dumps({"action": action, "order": order, "item": item}, separators=(",", ":"))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request(wording, rng).format(order=shown, item=item)},
            {"role": "assistant", "content": answer},
        ]
    }


def make_rows(train: int = 320, heldout: int = 40, seed: int = 0) -> tuple[list[dict], list[dict]]:
    rng = random.Random(seed)
    items = rng.sample(ITEMS, train + heldout)
    orders: dict[str, None] = {}  # a set that keeps its order
    while len(orders) < len(items):
        orders[order_number(rng)] = None

    rows = []
    actions = list(WORDINGS)
    for i, (order, item) in enumerate(zip(orders, items, strict=True)):
        action = actions[i % len(actions)]
        unseen = i >= train and i % 2 == 1
        wordings = WORDINGS[action][-UNSEEN:] if unseen else WORDINGS[action][:-UNSEEN]
        rows.append(row(action, rng.choice(wordings), order, item, rng))
    parts = rows[:train], rows[train:]
    for part in parts:
        rng.shuffle(part)
    return parts


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, rows in zip(("train", "heldout"), make_rows(), strict=True):
        (folder / f"{name}.jsonl").write_text(to_jsonl(rows))
