"""Small files in the layouts of benchmarks that people cite, made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def store(path: Path, content: Any) -> Path:
    """JSON, or JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".txt"):
        text = "".join(json.dumps(record) + "\n" for record in content)
    else:
        text = json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def locomo(name: str = "conv-1") -> dict[str, Any]:
    """A conversation of three sessions, the tenth after the second, and a question of every kind."""
    return {
        "sample_id": name,
        "conversation": {
            "speaker_a": "Ana",
            "speaker_b": "Ben",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Ana", "dia_id": "D1:1", "text": "I adopted a cat, Miso!"},
                {"speaker": "Ben", "dia_id": "D1:2", "text": "Lovely.", "blip_caption": "a grey cat"},
            ],
            "session_10_date_time": "9:00 am on 2 July, 2023",
            "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "I moved to Oslo."}],
            "session_2_date_time": "8:10 pm on 1 June, 2023",
            "session_2": [{"speaker": "Ana", "dia_id": "D2:1", "text": "I like rice, soup and tea."}],
        },
        "qa": [
            {"question": "What does Ana like?", "answer": "rice, tea", "evidence": ["D2:1"], "category": 1},
            {"question": "When did Ana adopt Miso?", "answer": "8 May 2023", "category": 2, "evidence": []},
            {"question": "Is Ben abroad?", "answer": "Likely yes; he moved", "category": 3, "evidence": []},
            {"question": "Where does Ben live?", "answer": "Oslo", "evidence": ["D10:1"], "category": 4},
            {"question": "When was that year?", "answer": 2023, "evidence": [], "category": 4},
            {
                "question": "What is the name of Ben's dog?",
                "adversarial_answer": "Miso",
                "evidence": ["D1:1"],
                "category": 5,
            },
        ],
        "event_summary": {},
        "observation": {},
        "session_summary": {},
    }


def longmemeval(name: str = "q1", kind: str = "single-session-user") -> dict[str, Any]:
    """A question about two chats that are not in the order of their dates."""
    return {
        "question_id": name,
        "question_type": kind,
        "question": "What is my cat called?",
        "answer": "Miso",
        "question_date": "2023/05/30 (Tue) 23:40",
        "haystack_session_ids": ["s2", "s1"],
        "haystack_dates": ["2023/05/21 (Sun) 10:00", "2023/05/20 (Sat) 02:21"],
        "haystack_sessions": [
            [{"role": "user", "content": "Thanks, bye."}, {"role": "assistant", "content": "Bye."}],
            [
                {"role": "user", "content": "My cat is called Miso.", "has_answer": True},
                {"role": "assistant", "content": "What a name!"},
                {"role": "user", "content": ""},
            ],
        ],
        "answer_session_ids": ["s1"],
    }


def msc(name: str = "d1", sessions: int = 2) -> dict[str, Any]:
    """A dialogue behind ``sessions - 1`` earlier ones."""
    earlier = {
        "personas": [["I cook."], ["I sail."]],
        "dialog": [{"text": "Hi, I cook a lot."}, {"text": "I sail."}],
        "time_num": 7,
        "time_unit": "days",
        "time_back": "7 days ago",
    }
    return {
        "personas": [["I cook."], ["I sail."]],
        "dialog": [
            {"id": "Speaker 1", "text": "What did you cook?"},
            {"id": "Speaker 2", "text": "Soup, on my boat."},
        ],
        "metadata": {"initial_data_id": name, "session_id": sessions - 1},
        "previous_dialogs": [earlier] * (sessions - 1),
        "init_personas": [["I cook."], ["I sail."]],
    }


def memory_agent_bench() -> dict[str, list[dict[str, Any]]]:
    """Ability -> rows: one of every kind of source."""

    def row(source: str, questions: list[str], answers: list[Any], **about: Any) -> dict[str, Any]:
        context = "0. Ana lives in Rome.\n1. Ana lives in Oslo.\n" * 20
        metadata = {
            "source": source,
            "qa_pair_ids": [f"{source}_{k}" for k in range(len(questions))],
            **about,
        }
        return {"context": context, "questions": questions, "answers": answers, "metadata": metadata}

    types = {"question_ids": ["q1", "q2_abs"], "question_types": ["multi-session", "multi-session"]}
    return {
        "Accurate_Retrieval": [
            row("eventqa_full", ["What is next?"], [["he ran", "home"]]),
            row("ruler_qa1_197K", ["Where?"], [["the Oslo", "Bergen"]]),
            row("longmemeval_s*", ["Who?", "Which dog?"], [["Ana"], ["There is none"]], **types),
        ],
        "Test_Time_Learning": [
            row("icl_banking77_5900shot_balance", ["lost card\nlabel:"], [["42"]]),
            row("recsys_redial_full", ["A film?"], [["77"]]),
        ],
        "Long_Range_Understanding": [
            row("detective_qa", ["Who did it?"], [["B. Ben"]]),
            row("infbench_sum_eng_shots2", ["Sum it up."], [["ana moved to oslo"]]),
        ],
        "Conflict_Resolution": [row("factconsolidation_sh_6k", ["Where is Ana?"], ["Oslo"])],
    }


def scbench() -> dict[str, list[dict[str, Any]]]:
    """Task -> lines."""
    lists: dict[str, list[tuple[str, Any]]] = {
        "scbench_kv": [("Value of a1?", "b-1"), ("Value of a2?", "b-2")],
        "scbench_qa_eng": [("Who?", ["Ana", "Ben"])],
        "scbench_qa_chn": [("谁？", ["安娜"])],
        "scbench_vt": [("Which?", ["ABC", "DEF"])],
        "scbench_mf": [("What is the largest? The largest number is", 7)],
        "scbench_many_shot": [("Which?", "(B)")],
        "scbench_summary": [("Sum it up.", "the cat sat")],
    }
    found = {
        name: [
            {"id": 0, "context": "text. " * 60, "multi_turns": [{"input": i, "answer": a} for i, a in turns]}
        ]
        for name, turns in lists.items()
    }
    choice = {"input": "Which?", "answer": "blue", "options": ["red", "blue", "green", "grey"]}
    found["scbench_choice_eng"] = [{"context": "It is blue.", "multi_turns": [choice]}]
    mixed = [
        {"input": "Find the function.", "answer": "def f(): ...", "task": "scbench_repoqa"},
        {"input": "Value of a1?", "answer": "b-1", "task": "scbench_kv"},
    ]
    found["scbench_repoqa_and_kv"] = [{"context": "x = 1", "multi_turns": mixed}]
    return found


def beam(folder: Path, size: str = "100K", number: int = 1) -> Path:
    """A conversation and its questions; the truncated file is the one that counts."""
    home = folder / "chats" / size / str(number)
    turns = [
        [
            {"role": "user", "id": 0, "time_anchor": "March-15-2024", "content": "I use Flask. ->-> 1,1"},
            {"role": "assistant", "id": 1, "content": "Good choice."},
        ],
        [{"role": "user", "id": 2, "content": "The sprint ends on March 29."}],
    ]
    store(home / "chat.json", [{"batch_number": 1, "turns": [[{"role": "user", "content": "too long"}]]}])
    store(home / "chat_trunecated.json", [{"batch_number": 1, "turns": turns}])
    questions = {
        "abstention": [
            {"question": "Who am I?", "ideal_response": "Nothing is said.", "rubric": ["says so"]}
        ],
        "event_ordering": [
            {"question": "In which order?", "answer": "1) a, 2) b, 3) c", "rubric": ["a", "b", "c"]}
        ],
        "information_extraction": [
            {"question": "When?", "answer": "March 29", "rubric": ["March 29", "the sprint"]}
        ],
        "instruction_following": [
            {"question": "Show code.", "expected_compliance": "Has code.", "rubric": ["code"]}
        ],
    }
    store(home / "probing_questions" / "probing_questions.json", questions)
    return home
