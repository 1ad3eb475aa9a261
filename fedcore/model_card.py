"""What a model card says of a model because of its plan, whoever hands the model out."""

from fedcore.plan import Plan


def described(plan: Plan) -> dict[str, object]:
    """How to build the model and what to feed it: strategy, architecture, input, classes, transform."""
    return {
        "strategy": plan.strategy,
        "model": plan.model.model_dump(mode="json"),
        "input": list(plan.model.input),
        "class_names": list(plan.class_names),
        "transform": {"mean": list(plan.mean), "std": list(plan.std)},
    }
