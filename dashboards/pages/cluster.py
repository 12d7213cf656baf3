"""The cluster: what runs, who works, what failed."""

from typing import Any

import pandas as pd
from dash import dcc, html

from hypernas.dashboards import frames
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.pages.parts import facts, graph, link, table
from hypernas.dashboards.texts import duration, number, plain
from hypernas.records import State


def cluster_page(study: LiveStudy) -> list[Any]:
    return [
        html.H1(["Cluster of ", html.Bdi(plain(study.row.name))]),
        html.Div(id="cluster-facts"),
        html.H2("Running"),
        html.Div(id="cluster-running"),
        graph("cluster-curves", "Losses of running trials"),
        html.H2("Workers"),
        html.Div(id="cluster-workers"),
        graph("cluster-failures", "Failures by cause"),
        graph("cluster-ranks", "Does a rung foretell the end?"),
        html.P("Spearman's rank correlation of the loss at each rung with the loss at the last one.", className="note"),
    ]


def cluster_facts(study: LiveStudy, workers: int, utilisation: float | None) -> html.Dl:
    asked = study.row.settings.trials
    rate, left = frames.pace(study.frame, asked)
    ended = int(study.frame["finished"].notna().sum())
    return facts(
        [
            ("Workers alive", workers),
            ("Utilisation", "–" if utilisation is None else f"{100 * utilisation:.0f} %"),
            ("Finished", f"{ended} of {asked}" if asked else str(ended)),
            ("Trials an hour", "–" if rate is None else f"{rate:.1f}"),
            ("Time left", duration(left) if workers and left else "–"),
        ]
    )


def running_table(study: LiveStudy, now: pd.Timestamp) -> Any:
    running = study.frame[study.frame["state"] == State.RUNNING]
    if running.empty:
        return html.P("Nothing is running.", className="note")
    loss = next((name for name in study.row.objectives if name in frames.LOSSES), None)
    rows = [
        [
            dcc.Link(str(record["trial"]), href=link("/trial", study.row.name, record["trial"])),
            duration((now - record["started"]).total_seconds()),
            "–" if pd.isna(record["rung"]) else f"{record['rung']:.0f}",
            number(loss, record[loss]) if loss else "–",
            record["architecture"],
        ]
        for record in running.to_dict("records")
    ]
    head = ["trial", "for", "rung", "loss there", "architecture"]
    return table(head, rows, numeric=head[:-1])


def workers_table(study: LiveStudy) -> Any:
    done = study.frame[study.frame["worker"] != ""]
    if done.empty:
        return html.P("No worker has finished a trial yet.", className="note")
    rows = []
    for worker, group in done.groupby("worker"):
        busy = group[["train_seconds", "evaluate_seconds"]].sum().sum()
        failed = int((group["state"] == State.FAILED).sum())
        rows.append([worker, len(group), failed, duration(busy), f"{group['finished'].max():%Y-%m-%d %H:%M:%S}"])
    head = ["worker", "trials", "failed", "busy", "last finished (UTC)"]
    return table(head, rows, numeric=["trials", "failed", "busy"])
