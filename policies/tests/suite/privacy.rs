//! What a rule keeps home stays there, through failures, hedging, checks of guests, and changes of policy; whatever the
//! other rules are.
use crate::policies::policy;
use crate::random::Rng;
use std::collections::BTreeMap;
use std::time::Duration;
use weir_policies::Rules;
use weir_scheduler::{
    Candidate, Event, Failure, FailureKind, Finish, FromNode, Generate, Held, Input, KvType, Limits, Logprob,
    ModelId, NodeId, Output, Price, Priority, Profile, Rates, RequestId, Scheduler, Time, ToNode, Token,
    Trust, Usage,
};

const MODEL: ModelId = ModelId([9; 32]);
/// Tagged `home`: nodes of our own only. Tagged `notb`: no node whose name begins with b, not even for a check.
const FIXED: &str = "
[[require]]
name = 'stays home'
when = \"'home' in request.tags\"
that = \"node.trust == 'own'\"
[[deny]]
name = 'not b'
when = \"'notb' in request.tags\"
that = \"node.name.startsWith('b')\"
";

fn rules(rng: &mut Rng, fixed: &str) -> Box<Rules> {
    let text = policy(rng, fixed);
    Box::new(Rules::parse(&text).unwrap_or_else(|why| panic!("{why}\n{text}")))
}

fn profile(rng: &mut Rng, n: u64) -> Profile {
    let trust = rng.of(&Trust::ALL);
    let (alone, full) = (Duration::from_millis(5), Duration::from_millis(10));
    let held = Held {
        model: MODEL,
        name: "m".into(),
        text: None,
        context: 4096,
        numerics: rng.of(&["x", "y"]).into(),
        kv: KvType::F16,
        kv_blocks: 64,
        slots: 1 + rng.below(3) as u32,
        rates: Rates { prefill_tokens_per_s: 1000.0, token_time_alone: alone, token_time_full: full },
        weights: 7,
        bytes: 7,
        pinned: true,
        resumes: true,
        grammars: true,
        prefixes: Vec::new(),
    };
    Profile {
        name: format!("{}{n}", rng.of(&["a", "b"])),
        identity: n + 1,
        trust,
        labels: vec![("country".into(), rng.of(&["DE", "US"]).into())],
        price: Price { prompt: 0, output: rng.below(3) * 1000 },
        models: vec![held],
        ..Profile::default()
    }
}

struct House {
    rng: Rng,
    now: Time,
    scheduler: Scheduler,
    nodes: BTreeMap<NodeId, (Trust, String)>,
    /// What runs where, and the tokens it has.
    jobs: BTreeMap<(NodeId, RequestId, u32), Generate>,
    /// By the first token of prompts, which tells whose text it is.
    tags: BTreeMap<u32, Vec<(String, String)>>,
    next: u64,
    /// Requests sent: to us, away, again after a failure, twice at once; and checks.
    counts: [u64; 5],
}

impl House {
    fn new(seed: u64) -> House {
        let mut rng = Rng(seed);
        let limits = Limits { check_one_in: 1, hedge_min: Duration::from_millis(20), ..Limits::default() };
        let policy = rules(&mut rng, FIXED);
        let scheduler = Scheduler::new(limits, policy, seed);
        let (now, next) = (Time::ZERO, 0);
        let (nodes, jobs, tags) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        House { rng, now, scheduler, nodes, jobs, tags, next, counts: [0; 5] }
    }

    fn tell(&mut self, input: Input) {
        self.scheduler.handle(self.now, input);
        while let Some(output) = self.scheduler.poll() {
            match output {
                Output::Send { node, message: ToNode::Generate(ask) } => self.sent(node, *ask),
                Output::Send { node, message: ToNode::Cancel { request, attempt } } => {
                    self.jobs.remove(&(node, request, attempt));
                }
                Output::Disconnect { node, .. } => _ = self.nodes.remove(&node),
                _ => {}
            }
        }
    }

    fn sent(&mut self, node: NodeId, ask: Generate) {
        let (trust, name) = &self.nodes[&node];
        let tagged = |name: &str| self.tags[&ask.prompt[0]].iter().any(|(tag, _)| tag == name);
        let own = *trust == Trust::Own;
        assert!(own || !(tagged("home") || tagged("private")), "what stays home goes to {name}, a {trust}");
        assert!(
            !(tagged("notb") && name.starts_with('b')),
            "what may not go to {name} does (check: {})",
            ask.request.is_own()
        );
        assert!(own || !ask.request.is_own(), "a check goes to {name}, a {trust}");
        let twice = self.jobs.keys().any(|(_, request, _)| *request == ask.request);
        let flags = [own, !own, ask.attempt > 0, twice, ask.request.is_own()];
        self.counts.iter_mut().zip(flags).for_each(|(count, flag)| *count += u64::from(flag));
        self.jobs.insert((node, ask.request, ask.attempt), ask);
    }

    fn join(&mut self) {
        self.next += 1;
        let (node, profile) = (NodeId(self.next), profile(&mut self.rng, self.next));
        self.nodes.insert(node, (profile.trust, profile.name.clone()));
        self.tell(Input::Connected { node, profile });
    }

    fn ask(&mut self) {
        self.next += 1;
        let all = [("home", 3), ("notb", 3), ("private", 6), ("team", 2)];
        let tags: Vec<(String, String)> = all
            .iter()
            .filter(|(_, odds)| self.rng.one_in(*odds))
            .map(|(name, _)| ((*name).to_owned(), "blue".to_owned()))
            .collect();
        self.tags.insert(self.next as u32, tags.clone());
        let prompt = vec![self.next as u32; 1 + self.rng.below(50) as usize];
        let ask = Generate {
            request: RequestId(self.next),
            tags,
            priority: self.rng.of(&[Priority::Normal, Priority::Interactive]),
            ..Generate::new(MODEL, prompt, 1 + self.rng.below(6) as u32)
        };
        self.tell(Input::Submit(Box::new(ask)));
    }

    /// A node says something of what it runs.
    fn answer(&mut self) {
        let Some(at) = self.jobs.len().checked_sub(1).map(|most| self.rng.below(most as u64 + 1) as usize)
        else {
            return;
        };
        let (&(node, request, attempt), ask) = self.jobs.iter_mut().nth(at).expect("it is in range");
        let position = ask.output.len() as u32;
        let failed = self.rng.one_in(12);
        let event = if failed {
            Event::Failed(Failure { kind: FailureKind::Internal, message: "a bit flipped".into() })
        } else if position >= ask.max_tokens {
            Event::Finished { reason: Finish::Length, text: String::new(), usage: Usage::default() }
        } else {
            ask.output.push(7);
            let candidate = Candidate { id: 7, logprob: -0.1, bytes: Vec::new() };
            let logprob = Some(Logprob { chosen: candidate.clone(), top: vec![candidate] });
            Event::Token(Token { position, id: 7, text: String::new(), logprob })
        };
        if !matches!(event, Event::Token(_)) {
            self.jobs.remove(&(node, request, attempt));
        }
        self.tell(Input::Node { node, from: FromNode::Event { request, attempt, event } });
    }

    fn step(&mut self) {
        self.now = self.now + Duration::from_millis(self.rng.below(30));
        match self.rng.below(24) {
            0 => self.join(),
            1 | 2 if self.nodes.len() > 2 => {
                let at = self.rng.below(self.nodes.len() as u64) as usize;
                let node = *self.nodes.keys().nth(at).expect("it is in range");
                if self.rng.one_in(2) {
                    let on = self.rng.one_in(2);
                    return self.tell(Input::Drain { node, on });
                }
                self.nodes.remove(&node);
                self.jobs.retain(|(on, ..), _| *on != node);
                self.tell(Input::Lost { node, reason: "gone".into() });
                self.join();
            }
            3 => {
                let policy = rules(&mut self.rng, FIXED);
                self.scheduler.set_policy(self.now, policy);
                self.tell(Input::Tick);
            }
            4..9 => self.ask(),
            9 | 10 => self.tell(Input::Tick),
            _ => self.answer(),
        }
        let heard = if self.rng.one_in(20) { self.nodes.keys().copied().collect() } else { Vec::new() };
        for node in heard {
            let from = FromNode::Status(weir_scheduler::Status::default());
            self.tell(Input::Node { node, from });
        }
    }
}

#[test]
fn what_stays_home_stays_home() {
    let mut counts = [0; 5];
    for seed in 0..150 {
        println!("seed {seed}");
        let mut house = House::new(seed);
        (0..6).for_each(|_| house.join());
        (0..300).for_each(|_| house.step());
        counts.iter_mut().zip(house.counts).for_each(|(all, count)| *all += count);
    }
    println!("to us, away, again, twice, checks: {counts:?}");
    assert!(counts.iter().all(|count| *count > 50), "to us, away, again, twice, checks: {counts:?}");
}

/// A test of the test: without the rule, it does leave.
#[test]
#[should_panic(expected = "what stays home goes to")]
fn without_the_rule_it_leaves() {
    for seed in 0..300 {
        let mut house = House::new(seed);
        let policy = rules(&mut house.rng, "");
        house.scheduler.set_policy(house.now, policy);
        (0..6).for_each(|_| house.join());
        (0..100).for_each(|_| house.ask());
    }
}
