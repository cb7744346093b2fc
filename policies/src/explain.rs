//! Why a request would go where it goes: for each node, kept or dropped, by which rule, with its points.
use crate::file::Rules;
use crate::pool::{NodeFile, PoolFile, RequestFile, duration, nano};
use serde::Serialize;
use std::time::Duration;
use weir_scheduler::{Ask, Decision, Denial, Held, PRIVATE, Trust};

/// What becomes of a request, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// What becomes of it.
    pub outcome: Outcome,
    /// Each node, those that it may go to first, the best of them first.
    pub nodes: Vec<Verdict>,
    /// The override that holds.
    pub overriding: Option<String>,
    /// Rules that apply to it, all but wishes.
    pub rules: Vec<String>,
    /// Providers may be used.
    pub spills: bool,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It goes to this node.
    Goes(String),
    /// All that may have it are full.
    Waits,
    /// No node may have it: why.
    Refused(String),
}

/// What a policy says of one node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Its name.
    pub node: String,
    /// Whose it is.
    pub trust: &'static str,
    /// It may have the request.
    pub kept: bool,
    /// It may, but has no room now.
    pub full: bool,
    /// The rule that keeps the request from it.
    pub rule: Option<String>,
    /// What that rule says.
    pub why: Option<String>,
    /// What couldn't be evaluated: then rules decide for caution.
    pub fault: Option<String>,
    /// The fewer the better.
    pub points: Option<f64>,
    /// Wishes that it meets.
    pub prefers: Vec<String>,
    /// Predicted time to the first token.
    pub ttft_ms: Option<f64>,
    /// Predicted time to the last token.
    pub total_ms: Option<f64>,
    /// What it would cost, by expectation.
    pub usd: Option<f64>,
}

impl Verdict {
    fn dropped(node: &NodeFile, rule: &str, why: &str) -> Verdict {
        Verdict {
            node: node.name.clone(),
            trust: node.trust().name(),
            kept: false,
            full: false,
            rule: Some(rule.to_owned()),
            why: Some(why.to_owned()),
            fault: None,
            points: None,
            prefers: Vec::new(),
            ttft_ms: None,
            total_ms: None,
            usd: None,
        }
    }
}

/// What would become of a request in a pool, and why. Fails if the pool or the request makes no sense.
pub fn explain(rules: &Rules, pool: &PoolFile, request: &RequestFile) -> Result<Explanation, String> {
    pool.check()?;
    let tags: Vec<(String, String)> = request.tags.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    let holders = pool.nodes.iter().flat_map(|node| &node.models).filter(|model| model.name == request.model);
    let ask = Ask {
        key: &request.key,
        tags: &tags,
        priority: request.priority()?,
        prompt_tokens: request.prompt_tokens,
        max_tokens: request.max_tokens,
        output_tokens: request.output_tokens,
        model: &request.model,
        model_bytes: holders.map(|model| model.bytes).max().unwrap_or(0),
        ttft: request.ttft_ms.map(duration),
        deadline: request.deadline_ms.map(duration),
        max_cost: request.max_usd.map(nano),
        waited: duration(request.waited_ms),
    };
    let view = pool.view(&request.model);
    let judging = rules.judge(&ask, &view);
    let mut nodes: Vec<Verdict> =
        pool.nodes.iter().enumerate().map(|(id, node)| verdict(&judging, id, node, &ask, request)).collect();
    nodes.sort_by(|a, b| {
        let points = |v: &Verdict| v.points.unwrap_or(f64::MAX);
        (!a.kept, a.full).cmp(&(!b.kept, b.full)).then(points(a).total_cmp(&points(b)))
    });
    Ok(Explanation {
        outcome: outcome(&nodes, &request.model),
        nodes,
        overriding: judging.overriding.map(|o| o.name.clone()),
        rules: judging.filters.iter().map(|rule| rule.name.clone()).collect(),
        spills: judging.spills == Ok(true),
    })
}

fn verdict(
    judging: &crate::judge::Judging<'_>,
    id: usize,
    node: &NodeFile,
    ask: &Ask<'_>,
    request: &RequestFile,
) -> Verdict {
    let dropped = |rule: &str, why: &str| Verdict::dropped(node, rule, why);
    let Some(model) = node.models.iter().find(|model| model.name == request.model) else {
        return dropped("model", "it doesn't hold the model");
    };
    let held: Held = node.held(model);
    let guest = node.trust() == Trust::Guest;
    // What guests say of themselves doesn't count.
    let labels: Vec<(String, String)> = match guest {
        true => Vec::new(),
        false => node.labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
    };
    let offer = node.offer(id, &held, &labels, model.running, request);
    let measured = |verdict: Verdict| Verdict {
        points: Some(judging.cost(&offer)),
        prefers: judging.granted(&offer).map(|wish| wish.name.clone()).collect(),
        ttft_ms: Some(ms(offer.ttft)),
        total_ms: Some(ms(offer.total)),
        usd: Some(offer.cost as f64 / 1e9),
        ..verdict
    };
    if request.prompt_tokens.saturating_add(request.output_tokens) >= held.context {
        return dropped("context", "the prompt leaves no room for an answer there");
    }
    if node.draining {
        return dropped("draining", "it gets nothing new");
    }
    if node.trust() != Trust::Own && ask.tags.iter().any(|(name, _)| name == PRIVATE) {
        return measured(dropped("private", "what is private is for nodes of our own only"));
    }
    if ask.max_cost.is_some_and(|most| offer.worst > most) {
        return measured(dropped("max_usd", "it may cost more there than the request allows"));
    }
    if let Some((Denial { rule, why }, fault)) = judging.denial(&offer) {
        let verdict = measured(dropped(rule, why));
        return Verdict { fault: fault.map(|fault| fault.to_string()), ..verdict };
    }
    let kept = Verdict { kept: true, full: !model.has_room(), rule: None, why: None, ..dropped("", "") };
    measured(kept)
}

fn outcome(nodes: &[Verdict], model: &str) -> Outcome {
    if let Some(best) = nodes.first().filter(|node| node.kept) {
        return if best.full { Outcome::Waits } else { Outcome::Goes(best.node.clone()) };
    }
    let mut reasons: Vec<String> = Vec::new();
    for node in nodes.iter().filter(|node| node.rule.as_deref() != Some("model")) {
        let (rule, why) = (node.rule.as_deref().unwrap_or_default(), node.why.as_deref().unwrap_or_default());
        let reason = format!("rule `{rule}`: {why}");
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    match reasons.is_empty() {
        true => Outcome::Refused(format!("no node holds `{model}`")),
        false => Outcome::Refused(reasons.join("; ")),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
