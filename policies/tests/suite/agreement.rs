//! An explanation says what the scheduler does.
use crate::policies::policy;
use crate::random::Rng;
use std::time::Duration;
use weir_policies::{Outcome, PoolFile, RequestFile, Rules, explain};
use weir_scheduler::{
    Event, FailureKind, Generate, Held, Input, KvType, Limits, ModelId, NodeId, Output, Price, Priority,
    Profile, Rates, RequestId, Scheduler, Time, ToNode, Trust,
};

const MODEL: ModelId = ModelId([9; 32]);

/// A node, in both forms.
fn node(rng: &mut Rng, n: u64) -> (String, Profile) {
    let trust = rng.of(&Trust::ALL);
    let (token_ms, usd) = (1 + rng.below(40), rng.below(4));
    let (slots, country) = (1 + rng.below(4), rng.of(&["DE", "US", ""]));
    let rates = Rates {
        prefill_tokens_per_s: 1000.0,
        token_time_alone: Duration::from_millis(token_ms),
        token_time_full: Duration::from_millis(token_ms),
    };
    let held = Held {
        model: MODEL,
        name: "m".into(),
        text: None,
        context: 4096,
        numerics: "n".into(),
        kv: KvType::F16,
        kv_blocks: 64,
        slots: slots as u32,
        rates,
        weights: 7,
        bytes: 7,
        pinned: true,
        resumes: true,
        grammars: true,
        prefixes: Vec::new(),
    };
    let text = format!(
        "[[node]]\nname = 'n{n}'\ntrust = '{trust}'\nlabels = {{ country = '{country}' }}\noutput_usd_per_mtok = {usd}\n\
         models = [{{ name = 'm', bytes = 7, context = 4096, slots = {slots}, token_ms = {token_ms}, numerics = 'n' }}]\n"
    );
    let profile = Profile {
        name: format!("n{n}"),
        identity: n + 1,
        trust,
        labels: vec![("country".into(), country.into())],
        price: Price { prompt: 0, output: usd * 1000 },
        models: vec![held],
        ..Profile::default()
    };
    (text, profile)
}

/// Where the scheduler sends a request.
fn placed(rules: Rules, profiles: Vec<Profile>, ask: Generate) -> Outcome {
    let mut scheduler = Scheduler::new(Limits::default(), Box::new(rules), 1);
    let names: Vec<String> = profiles.iter().map(|profile| profile.name.clone()).collect();
    for (n, profile) in profiles.into_iter().enumerate() {
        scheduler.handle(Time::ZERO, Input::Connected { node: NodeId(n as u64), profile });
    }
    scheduler.handle(Time::ZERO, Input::Submit(Box::new(ask)));
    while let Some(output) = scheduler.poll() {
        match output {
            Output::Send { node, message: ToNode::Generate(_) } => {
                return Outcome::Goes(names[node.0 as usize].clone());
            }
            Output::Emit { event: Event::Failed(failure), .. } => {
                assert_eq!(failure.kind, FailureKind::Invalid, "{}", failure.message);
                return Outcome::Refused(failure.message);
            }
            _ => {}
        }
    }
    Outcome::Waits
}

#[test]
fn explanations_say_what_the_scheduler_does() {
    let (mut sent, mut refused) = (0, 0);
    for seed in 0..600 {
        let mut rng = Rng(seed);
        let text = policy(&mut rng, "");
        let rules = Rules::parse(&text).unwrap_or_else(|why| panic!("seed {seed}: {why}\n{text}"));
        let (texts, profiles): (Vec<String>, Vec<Profile>) =
            (0..1 + rng.below(12)).map(|n| node(&mut rng, n)).unzip();
        let pool = PoolFile::parse(&texts.concat()).unwrap();
        let team = rng.one_in(2);
        let (private, max_usd) = (rng.one_in(5), rng.one_in(4).then_some(0.0003));
        let named = [("team", team), ("private", private)].into_iter().filter(|tag| tag.1);
        let tags: Vec<(String, String)> = named.map(|tag| (tag.0.to_owned(), "blue".to_owned())).collect();
        let ask = Generate {
            request: RequestId(1),
            tags: tags.clone(),
            priority: Priority::Normal,
            max_cost: max_usd.map(|usd: f64| (usd * 1e9) as u64),
            ..Generate::new(MODEL, vec![1; 100], 200)
        };
        let request = RequestFile {
            model: "m".into(),
            tags: tags.into_iter().collect(),
            prompt_tokens: 100,
            max_tokens: 200,
            max_usd,
            ..RequestFile::default()
        };
        let explained = explain(&rules, &pool, &request).unwrap();
        let came = placed(rules, profiles, ask);
        match (&explained.outcome, &came) {
            (Outcome::Refused(_), Outcome::Refused(message)) => {
                refused += 1;
                assert!(message.contains("the policy refuses it"), "{message}");
            }
            (ours, theirs) => {
                sent += 1;
                assert_eq!(ours, theirs, "seed {seed}\n{text}\n{}{explained:#?}", texts.concat());
            }
        }
    }
    assert!(sent > 100 && refused > 100, "{sent} sent, {refused} refused");
}
