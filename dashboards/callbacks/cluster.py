"""The cluster's page."""

import pandas as pd
from dash import Dash, Input, Output, State, no_update

from hypernas import records
from hypernas.dashboards import figures, frames, pages
from hypernas.dashboards.live import Watch


def wire_cluster(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("cluster-facts", "children"),
        Output("cluster-running", "children"),
        Output("cluster-workers", "children"),
        Input("tick", "n_intervals"),
        Input("study", "data"),
    )
    def cluster(_: int, shown: dict) -> tuple:
        study, store = watch.study(shown["name"]), watch.store()
        if study is None or store is None:
            return (no_update,) * 3
        workers = sum(store.live_drivers(study.row).values())
        now = pd.Timestamp.now("UTC")
        return (
            pages.cluster_facts(study, workers, study.utilisation()),
            pages.running_table(study, now),
            pages.workers_table(study),
        )

    @app.callback(
        Output("cluster-failures", "figure"),
        Output("cluster-ranks", "figure"),
        Output("cluster-curves", "figure"),
        Input("seq", "data"),
        State("study", "data"),
    )
    def history(_: int, shown: dict) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return (no_update,) * 3
        counts = frames.failure_counts(study.frame)
        causes = pd.DataFrame({"cause": [kind.replace("_", " ") for kind in counts], "trials": list(counts.values())})
        complete = study.frame.loc[study.frame["state"] == records.State.COMPLETE, "trial"].tolist()
        ranks = frames.rank_frame(watch.curves(study, complete), complete)
        ranks["rung"] = [
            f"rung {rung} ({trials} trials)" for rung, trials in zip(ranks["rung"], ranks["trials"], strict=True)
        ]
        running = study.frame.loc[study.frame["state"] == records.State.RUNNING, "trial"].tolist()
        return (
            figures.bar_figure(causes, "cause", "trials", "failed trials", "No trial has failed."),
            figures.bar_figure(
                ranks, "rung", "correlation", "rank correlation", "Too few trials with several rungs yet.", 1.0
            ),
            figures.curve_figure(watch.curves(study, running), running, frames.loss_name(study.row))
            if running
            else figures.message_figure("Nothing is running."),
        )
