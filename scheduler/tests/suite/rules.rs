//! Single rules.
use crate::money::allow;
use crate::samples::{MODEL, ask, profile};
use std::time::Duration;
use weir_scheduler::{
    Account, Allowance, BlockKey, CacheStatus, Candidate, Event, Failure, FailureKind, Fastest, Finish,
    FromNode, Generate, Holder, Input, KvType, Limit, Limits, Logprob, ModelStatus, NodeId, Output, Period,
    Price, Priority, Profile, Rates, RequestId, Scheduler, Status, Time, ToNode, Token, Trust, Unit, Usage,
    Who,
};

fn scheduler(nodes: u64) -> Scheduler {
    let mut scheduler = Scheduler::new(Limits { waiting_max: 3, ..Limits::default() }, Box::new(Fastest), 1);
    for id in 0..nodes {
        let input = Input::Connected { node: NodeId(id), profile: profile(&format!("n{id}"), 2) };
        scheduler.handle(Time::ZERO, input);
    }
    scheduler
}

fn outputs(scheduler: &mut Scheduler) -> Vec<Output> {
    std::iter::from_fn(|| scheduler.poll()).collect()
}

fn at(ms: u64) -> Time {
    Time::ZERO + Duration::from_millis(ms)
}

fn submit(scheduler: &mut Scheduler, id: u64, priority: Priority) {
    let mut ask = ask(id, vec![1, 2, 3], 10);
    ask.priority = priority;
    scheduler.handle(at(1), Input::Submit(Box::new(ask)));
}

fn token(scheduler: &mut Scheduler, now: Time, node: u64, id: u64, attempt: u32, position: u32) {
    let event = Event::Token(Token { position, id: 100 + position, text: String::new(), logprob: None });
    say(scheduler, now, node, id, attempt, event);
}

fn say(scheduler: &mut Scheduler, now: Time, node: u64, id: u64, attempt: u32, event: Event) {
    let from = FromNode::Event { request: RequestId(id), attempt, event };
    scheduler.handle(now, Input::Node { node: NodeId(node), from });
}

/// A node's heartbeat.
fn beat(scheduler: &mut Scheduler, now: Time, node: u64, alive: bool) {
    let from = FromNode::Status(Status { models: vec![status(alive)], ..Status::default() });
    scheduler.handle(now, Input::Node { node: NodeId(node), from });
}

fn status(alive: bool) -> ModelStatus {
    ModelStatus {
        model: MODEL,
        alive,
        running: u32::from(alive),
        waiting: 0,
        queued_tokens: 0,
        kv_blocks_free: 0,
        steps: 0,
        rates: None,
    }
}

/// The nodes that were sent `Generate`, with attempts and tokens so far.
fn sent(outputs: &[Output]) -> Vec<(u64, u64, u32, usize)> {
    let sent = |output: &Output| match output {
        Output::Send { node, message: ToNode::Generate(ask) } => {
            Some((node.0, ask.request.0, ask.attempt, ask.output.len()))
        }
        _ => None,
    };
    outputs.iter().filter_map(sent).collect()
}

fn failure(outputs: &[Output], id: u64) -> Option<Failure> {
    outputs.iter().find_map(|output| match output {
        Output::Emit { request, event: Event::Failed(failure) } if request.0 == id => Some(failure.clone()),
        _ => None,
    })
}

#[test]
fn without_a_node_or_with_too_long_a_prompt_it_fails_at_once() {
    let mut s = scheduler(0);
    submit(&mut s, 1, Priority::Normal);
    assert_eq!(failure(&outputs(&mut s), 1).unwrap().kind, FailureKind::NoModel);
    let mut s = scheduler(1);
    s.handle(at(1), Input::Submit(Box::new(ask(2, vec![0; 1024], 10))));
    let failure = failure(&outputs(&mut s), 2).unwrap();
    assert_eq!(failure.kind, FailureKind::Invalid);
    assert!(failure.message.contains("1024"), "{}", failure.message);
}

#[test]
fn the_less_busy_node_gets_it() {
    let mut s = scheduler(2);
    for id in 0..4 {
        submit(&mut s, id, Priority::Normal);
    }
    let nodes: Vec<u64> = sent(&outputs(&mut s)).iter().map(|s| s.0).collect();
    assert_eq!(nodes, [0, 1, 0, 1]);
}

#[test]
fn the_important_overtake_and_the_queue_is_bounded() {
    let mut s = scheduler(1);
    for id in 0..4 {
        submit(&mut s, id, Priority::Background);
    }
    assert_eq!(sent(&outputs(&mut s)).len(), 2, "two slots");
    submit(&mut s, 4, Priority::Interactive);
    assert_eq!(sent(&outputs(&mut s)), [(0, 4, 0, 0)], "background work steps aside on the node");
    submit(&mut s, 5, Priority::Normal);
    submit(&mut s, 6, Priority::Normal);
    submit(&mut s, 7, Priority::Normal);
    let out = outputs(&mut s);
    assert_eq!(failure(&out, 7).unwrap().kind, FailureKind::Busy);
    let end = Event::Finished { reason: Finish::Stop, text: String::new(), usage: Usage::default() };
    say(&mut s, at(2), 0, 4, 0, end.clone());
    say(&mut s, at(3), 0, 0, 0, end.clone());
    say(&mut s, at(3), 0, 1, 0, end);
    let order: Vec<u64> = sent(&out).iter().chain(&sent(&outputs(&mut s))).map(|s| s.1).collect();
    assert_eq!(order[..2], [5, 6], "normal before background");
}

#[test]
fn a_lost_nodes_request_goes_on_elsewhere() {
    let mut s = scheduler(2);
    submit(&mut s, 1, Priority::Normal);
    token(&mut s, at(5), 0, 1, 0, 0);
    token(&mut s, at(6), 0, 1, 0, 1);
    outputs(&mut s);
    s.handle(at(7), Input::Lost { node: NodeId(0), reason: "killed".into() });
    assert_eq!(sent(&outputs(&mut s)), [(1, 1, 1, 2)]);
    token(&mut s, at(8), 0, 1, 0, 2);
    token(&mut s, at(8), 1, 1, 0, 2);
    assert_eq!(outputs(&mut s), [], "nobody listens to the dead, nor to an older attempt");
    token(&mut s, at(9), 1, 1, 1, 2);
    assert_eq!(outputs(&mut s).len(), 1);
    s.handle(at(10), Input::Lost { node: NodeId(1), reason: "killed too".into() });
    assert_eq!(outputs(&mut s), [], "a node may come back");
    s.handle(at(9000), Input::Connected { node: NodeId(2), profile: profile("n2", 2) });
    assert_eq!(sent(&outputs(&mut s)), [(2, 1, 2, 3)]);
    s.handle(at(9001), Input::Lost { node: NodeId(2), reason: "killed too".into() });
    s.handle(at(19_002), Input::Tick);
    let failure = failure(&outputs(&mut s), 1).unwrap();
    assert_eq!(failure.kind, FailureKind::Internal);
    assert!(failure.message.contains("killed too"), "{}", failure.message);
}

#[test]
fn a_stalled_nodes_request_moves_unless_its_reader_is_behind() {
    for behind in [false, true] {
        let mut s = scheduler(2);
        submit(&mut s, 1, Priority::Normal);
        token(&mut s, at(5), 0, 1, 0, 0);
        s.handle(at(6), Input::Reader { request: RequestId(1), behind });
        outputs(&mut s);
        for ms in (500..=6000).step_by(500) {
            for node in [0, 1] {
                beat(&mut s, at(ms), node, true);
            }
            s.handle(at(ms), Input::Tick);
        }
        let expected = if behind { vec![] } else { vec![(1, 1, 1, 1)] };
        assert_eq!(sent(&outputs(&mut s)), expected);
    }
}

#[test]
fn a_lost_position_is_the_nodes_fault() {
    let mut s = scheduler(2);
    submit(&mut s, 1, Priority::Normal);
    token(&mut s, at(5), 0, 1, 0, 0);
    outputs(&mut s);
    token(&mut s, at(6), 0, 1, 0, 2);
    let out = outputs(&mut s);
    let cancel = ToNode::Cancel { request: RequestId(1), attempt: 0 };
    assert_eq!(out[0], Output::Send { node: NodeId(0), message: cancel });
    assert_eq!(sent(&out), [(1, 1, 1, 1)]);
}

#[test]
fn a_dead_engine_and_a_passed_deadline_end_it() {
    let mut s = scheduler(1);
    submit(&mut s, 1, Priority::Normal);
    beat(&mut s, at(5), 0, false);
    assert!(failure(&outputs(&mut s), 1).unwrap().message.contains("engine"));

    let mut s = scheduler(1);
    let mut late = ask(1, vec![1], 10);
    late.deadline = Some(Duration::from_millis(20));
    s.handle(at(5), Input::Submit(Box::new(late)));
    outputs(&mut s);
    assert_eq!(s.wake_at(), Some(at(25)));
    s.handle(at(25), Input::Tick);
    let out = outputs(&mut s);
    assert!(matches!(out[0], Output::Send { message: ToNode::Cancel { .. }, .. }));
    assert_eq!(failure(&out, 1).unwrap().kind, FailureKind::Deadline);
}

#[test]
fn a_silent_node_is_given_up_but_not_for_our_own_sleep() {
    let mut s = scheduler(1);
    s.handle(at(60_000), Input::Tick);
    assert_eq!(outputs(&mut s), [], "we slept ourselves");
    let mut s = scheduler(1);
    while let Some(due) = s.wake_at() {
        s.handle(due, Input::Tick);
    }
    assert!(matches!(outputs(&mut s)[..], [Output::Disconnect { node: NodeId(0), .. }]));
    assert_eq!(s.load().nodes, 0);
}

#[test]
fn a_silent_nodes_requests_move_before_it_is_given_up() {
    let mut s = scheduler(2);
    submit(&mut s, 1, Priority::Normal);
    token(&mut s, at(5), 0, 1, 0, 0);
    outputs(&mut s);
    let mut moved = None;
    for ms in (500..=4000).step_by(500) {
        s.handle(at(ms), Input::Node { node: NodeId(1), from: FromNode::Status(Status::default()) });
        s.handle(at(ms), Input::Tick);
        if let [(to, 1, 1, 1)] = sent(&outputs(&mut s))[..] {
            moved = moved.or(Some((to, ms)));
        }
    }
    assert_eq!(moved, Some((1, 3000)), "soon after it is suspected");
    assert_eq!(s.load().nodes, 2, "it may come back");
}

#[test]
fn a_draining_node_gets_nothing_and_what_runs_there_moves() {
    let mut s = scheduler(1);
    submit(&mut s, 1, Priority::Normal);
    token(&mut s, at(5), 0, 1, 0, 0);
    outputs(&mut s);
    s.handle(at(6), Input::Drain { node: NodeId(0), on: true });
    assert_eq!(outputs(&mut s), [], "there is nowhere to go, so it goes on");
    token(&mut s, at(7), 0, 1, 0, 1);
    submit(&mut s, 2, Priority::Normal);
    let out = outputs(&mut s);
    assert_eq!(failure(&out, 2).unwrap().kind, FailureKind::NoModel, "{out:?}");

    s.handle(at(8), Input::Connected { node: NodeId(1), profile: profile("n1", 2) });
    let beat = FromNode::Status(Status::default());
    s.handle(at(9), Input::Node { node: NodeId(0), from: beat });
    let out = outputs(&mut s);
    assert_eq!(
        out[0],
        Output::Send { node: NodeId(0), message: ToNode::Cancel { request: RequestId(1), attempt: 0 } }
    );
    assert_eq!(sent(&out), [(1, 1, 1, 2)]);
    assert!(s.survey(at(9))[0].draining);

    s.handle(at(10), Input::Drain { node: NodeId(0), on: false });
    submit(&mut s, 3, Priority::Normal);
    assert_eq!(sent(&outputs(&mut s)), [(0, 3, 0, 0)]);
}

fn wants(scheduler: &mut Scheduler, id: u64, change: impl FnOnce(&mut Generate)) {
    let mut asked = ask(id, vec![1, 2, 3], 5);
    change(&mut asked);
    scheduler.handle(at(0), Input::Submit(Box::new(asked)));
}

#[test]
fn a_slow_request_that_somebody_watches_is_tried_by_another_node() {
    for winner in [0, 1] {
        let mut s = scheduler(2);
        wants(&mut s, 1, |asked| asked.priority = Priority::Interactive);
        let first = sent(&outputs(&mut s))[0].0;
        for node in [0, 1] {
            beat(&mut s, at(900), node, true);
        }
        s.handle(at(900), Input::Tick);
        assert_eq!(outputs(&mut s), [], "it isn't late yet");
        s.handle(at(1100), Input::Tick);
        assert_eq!(sent(&outputs(&mut s)), [(1 - first, 1, 1, 0)], "the other node, attempt 1");
        assert_eq!((s.load().running, s.load().hedged), (1, 1));
        let (node, attempt) = if winner == 0 { (first, 0) } else { (1 - first, 1) };
        token(&mut s, at(1200), node, 1, attempt, 0);
        let told = outputs(&mut s);
        let stop = ToNode::Cancel { request: RequestId(1), attempt: 1 - attempt };
        assert!(told.contains(&Output::Send { node: NodeId(1 - node), message: stop }), "{told:?}");
        // What the loser still says isn't heard.
        token(&mut s, at(1201), 1 - node, 1, 1 - attempt, 0);
        assert_eq!(outputs(&mut s), []);
        assert_eq!((s.load().running, s.load().hedged), (1, 0));
        s.check();
    }
}

#[test]
fn others_are_not_hedged_nor_without_room_to_spare() {
    let mut s = scheduler(2);
    wants(&mut s, 1, |_| ());
    outputs(&mut s);
    s.handle(at(1100), Input::Tick);
    assert_eq!(sent(&outputs(&mut s)), []);
    let mut s = scheduler(1);
    wants(&mut s, 1, |asked| asked.priority = Priority::Interactive);
    outputs(&mut s);
    s.handle(at(1100), Input::Tick);
    assert_eq!(sent(&outputs(&mut s)), []);
}

#[test]
fn what_no_node_can_do_in_time_is_refused_at_once() {
    // 1,000 tokens of prompt a second, 10 ms a token.
    let mut s = scheduler(1);
    wants(&mut s, 1, |asked| (asked.prompt, asked.ttft) = (vec![1; 900], Some(Duration::from_millis(300))));
    let refused = failure(&outputs(&mut s), 1).unwrap();
    assert_eq!(refused.kind, FailureKind::Deadline);
    assert!(refused.message.contains("within 0.300 s"), "{}", refused.message);
    wants(&mut s, 2, |asked| {
        (asked.prompt, asked.deadline) = (vec![1; 900], Some(Duration::from_millis(300)))
    });
    assert_eq!(failure(&outputs(&mut s), 2).unwrap().kind, FailureKind::Deadline);
    wants(&mut s, 3, |asked| (asked.prompt, asked.ttft) = (vec![1; 900], Some(Duration::from_millis(600))));
    assert_eq!(sent(&outputs(&mut s)).len(), 1, "it may be faster than we think");
}

#[test]
fn a_budget_is_reserved_settled_and_not_passed() {
    let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), 1);
    let price = Price { prompt: 1, output: 10 };
    let profile = Profile { price, ..profile("n0", 4) };
    s.handle(at(0), Input::Connected { node: NodeId(0), profile });
    let (key, account) = allow(&mut s, 100);
    wants(&mut s, 1, |asked| asked.key = key);
    assert_eq!(s.balance(&account).reserved, 3 + 5 * 10);
    wants(&mut s, 2, |asked| asked.key = key);
    let told = outputs(&mut s);
    let reserved =
        told.iter().position(|o| matches!(o, Output::Reserved { entries, .. } if entries[0].reserved == 53));
    let sent = told.iter().position(|o| matches!(o, Output::Send { .. }));
    assert!(reserved.is_some() && reserved < sent, "what is reserved is said before it is sent: {told:?}");
    let refused = failure(&told, 2).unwrap();
    assert_eq!(refused.kind, FailureKind::Budget { after_s: 2 }, "something may be given back soon");
    assert!(refused.message.contains("$0.000000 are left"), "{}", refused.message);
    token(&mut s, at(10), 0, 1, 0, 0);
    let usage = Usage::default();
    say(&mut s, at(20), 0, 1, 0, Event::Finished { reason: Finish::Stop, text: String::new(), usage });
    let spent = Output::Spent { key, request: RequestId(1), attempt: 0, amount: 3 + 10, worst: 53 };
    let told = outputs(&mut s);
    assert!(told.contains(&spent), "{told:?}");
    assert_eq!((s.balance(&account).spent, s.balance(&account).reserved), (13, 0));
    s.check();
    s.handle(at(30), Input::Booked { account: account.clone(), window: 0, taken: 80 });
    wants(&mut s, 3, |asked| asked.key = key);
    let refused = failure(&outputs(&mut s), 3).unwrap();
    assert_eq!(refused.kind, FailureKind::Budget { after_s: 86_400 });
    assert!(refused.message.contains("the next day begins in 24 h"), "{}", refused.message);
}

#[test]
fn a_rate_is_kept_and_tokens_are_counted_once() {
    let mut s = scheduler(4);
    let limit = |amount, unit| Limit { amount, unit, period: Period::Minute };
    let each = |limit| Allowance { who: Who::Everybody, limit };
    s.handle(at(0), Input::Allow(vec![each(limit(4, Unit::Requests)), each(limit(20, Unit::Tokens))]));
    let tokens = Account { holder: Holder::Everybody, unit: Unit::Tokens, period: Period::Minute };
    wants(&mut s, 1, |_| ());
    wants(&mut s, 2, |_| ());
    assert_eq!(s.balance(&tokens).reserved, 2 * (3 + 5));
    wants(&mut s, 3, |_| ());
    let told = outputs(&mut s);
    assert!(!told.iter().any(|o| matches!(o, Output::Reserved { .. })), "a rate doesn't outlive the process");
    let refused = failure(&told, 3).unwrap();
    assert_eq!(refused.kind, FailureKind::Rate { after_s: 2 }, "{}", refused.message);
    token(&mut s, at(10), 0, 1, 0, 0);
    s.handle(at(20), Input::Cancel(RequestId(1)));
    s.handle(at(20), Input::Cancel(RequestId(2)));
    assert_eq!((s.balance(&tokens).spent, s.balance(&tokens).reserved), (3 + 1, 0));
    wants(&mut s, 4, |asked| asked.max_tokens = 1);
    wants(&mut s, 5, |asked| asked.max_tokens = 1);
    outputs(&mut s);
    wants(&mut s, 6, |asked| asked.max_tokens = 1);
    let refused = failure(&outputs(&mut s), 6).unwrap();
    assert!(matches!(refused.kind, FailureKind::Rate { .. }), "{}", refused.message);
    assert!(refused.message.contains("4 requests in any minute"), "{}", refused.message);
    s.check();
}

#[test]
fn what_is_private_goes_to_nodes_of_our_own_alone() {
    for seed in 0..200 {
        let mut rng = crate::random::Rng(seed);
        let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), seed);
        let trust: Vec<Trust> = (0..6).map(|_| Trust::ALL[rng.below(3) as usize]).collect();
        for node in 0..6 {
            let trust = trust[node as usize];
            let profile = Profile { trust, identity: node + 1, ..profile("n", 2) };
            s.handle(at(0), Input::Connected { node: NodeId(node), profile });
        }
        for id in 0..20 {
            let now = at(id * 10);
            let mut asked = ask(id, vec![id as u32], 3);
            asked.priority = Priority::Interactive;
            if id % 2 == 0 {
                asked.tags = vec![("private".into(), String::new())];
            }
            s.handle(now, Input::Submit(Box::new(asked)));
            if rng.one_in(4) {
                let node = NodeId(rng.below(6));
                s.handle(now, Input::Lost { node, reason: "gone".into() });
            }
            for (node, request, ..) in sent(&outputs(&mut s)) {
                let trust = trust[node as usize];
                assert!(
                    request % 2 == 1 || trust == Trust::Own,
                    "seed {seed}: {request} left the house for {node}"
                );
            }
        }
    }
}

#[test]
fn what_a_guest_says_of_itself_does_not_count() {
    for trust in Trust::ALL {
        let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), 1);
        let labels = vec![("country".to_owned(), "DE".to_owned())];
        let profile = Profile { trust, labels: labels.clone(), ..profile("n", 1) };
        s.handle(at(0), Input::Connected { node: NodeId(0), profile });
        let known = if trust == Trust::Guest { Vec::new() } else { labels };
        assert_eq!(s.survey(at(0))[0].labels, known, "{trust}");
    }
}

/// A guest answers `rounds` times; a node of ours finds its token so far below the likeliest. Returns whether the guest is
/// there in the end.
fn guest_stays(below: &[f32], rounds: usize) -> bool {
    let limits = Limits { check_one_in: 1, ..Limits::default() };
    let mut s = Scheduler::new(limits, Box::new(Fastest), 1);
    for (node, trust) in [(0, Trust::Guest), (1, Trust::Own)] {
        let profile = Profile { trust, identity: node + 1, ..profile("n", 4) };
        s.handle(at(0), Input::Connected { node: NodeId(node), profile });
        s.handle(at(0), Input::Drain { node: NodeId(node), on: node == 1 });
    }
    for round in 0..rounds {
        let (now, id) = (at(round as u64 * 10), round as u64);
        s.handle(now, Input::Submit(Box::new(ask(id, vec![1, 2], 1))));
        token(&mut s, now, 0, id, 0, 0);
        s.handle(now, Input::Drain { node: NodeId(1), on: false });
        let usage = Usage::default();
        say(&mut s, now, 0, id, 0, Event::Finished { reason: Finish::Length, text: String::new(), usage });
        let told = outputs(&mut s);
        let checks: Vec<_> = sent(&told).into_iter().filter(|sent| RequestId(sent.1).is_own()).collect();
        assert!(checks.iter().all(|check| check.0 == 1), "we check on nodes of our own: {told:?}");
        for (node, check, attempt, _) in checks {
            let said = 100;
            let candidate = |id, logprob| Candidate { id, logprob, bytes: Vec::new() };
            let gap = below[round % below.len()];
            let top = vec![candidate(said + 1, -0.5), candidate(said, -0.5 - gap)];
            let logprob = Some(Logprob { chosen: top[0].clone(), top });
            let other = Token { position: 0, id: said + 1, text: String::new(), logprob };
            say(&mut s, now, node, check, attempt, Event::Token(other));
            let end = Event::Finished { reason: Finish::Length, text: String::new(), usage };
            say(&mut s, now, node, check, attempt, end);
        }
        let told = outputs(&mut s);
        if told.iter().any(|o| matches!(o, Output::Disconnect { node: NodeId(0), .. })) {
            // Nor may it come again.
            let profile = Profile { trust: Trust::Guest, identity: 1, ..profile("n", 4) };
            s.handle(now, Input::Connected { node: NodeId(9), profile });
            assert!(matches!(outputs(&mut s).as_slice(), [Output::Disconnect { node: NodeId(9), .. }]));
            return false;
        }
        s.handle(now, Input::Drain { node: NodeId(1), on: true });
    }
    true
}

#[test]
fn guests_are_refuted_by_tokens_far_off_again_and_again() {
    assert!(guest_stays(&[0.0], 50), "they agree");
    assert!(guest_stays(&[0.3], 50), "near ties");
    assert!(guest_stays(&[0.0, 0.1, 0.0, 0.0, 8.0], 100), "once in a while");
    assert!(!guest_stays(&[8.0], 3), "always");
    assert!(!guest_stays(&[8.0, 0.0], 20), "every other one");
}

#[test]
fn the_nearer_node_gets_it() {
    for far in [0, 1] {
        let mut s = scheduler(2);
        s.handle(at(1), Input::RoundTrip { node: NodeId(far), time: Duration::from_millis(80) });
        submit(&mut s, 1, Priority::Normal);
        assert_eq!(sent(&outputs(&mut s)), [(1 - far, 1, 0, 0)]);
    }
}

/// What a heartbeat says of a cache draws a prompt there, and away again.
#[test]
fn heartbeats_tell_of_caches() {
    let prompt: Vec<u32> = (0..640).collect();
    let keys: Vec<BlockKey> = weir_scheduler::chain(MODEL, KvType::F16, 0, &prompt).collect();
    let beat = |s: &mut Scheduler, new: &[BlockKey], gone: &[BlockKey]| {
        let cache = CacheStatus { model: MODEL, new: new.to_vec(), gone: gone.to_vec() };
        let status = Status { caches: vec![cache], ..Status::default() };
        s.handle(at(1), Input::Node { node: NodeId(1), from: FromNode::Status(status) });
    };
    let asks = |s: &mut Scheduler, id| {
        s.handle(at(2), Input::Submit(Box::new(ask(id, prompt.clone(), 10))));
        let node = sent(&outputs(s))[0].0;
        s.handle(at(2), Input::Cancel(RequestId(id)));
        outputs(s);
        node
    };
    let mut s = scheduler(2);
    assert_eq!(asks(&mut s, 1), 0);
    beat(&mut s, &keys, &[]);
    assert_eq!(asks(&mut s, 2), 1);
    beat(&mut s, &[], &keys);
    assert_eq!(asks(&mut s, 3), 0);
    // However long it is.
    let many: Vec<BlockKey> =
        (0..5000u32).map(|n| BlockKey([n.to_le_bytes(); 4].concat().try_into().unwrap())).collect();
    beat(&mut s, &many, &many);
    assert_eq!(asks(&mut s, 4), 0);
}

/// What a node does for other schedulers of the cluster counts as if it were for this one.
#[test]
fn heartbeats_tell_of_other_schedulers() {
    let beat = |s: &mut Scheduler, node: u64, others: u32| {
        let others = if others > 0 { vec![(MODEL, others)] } else { Vec::new() };
        let status = Status { models: vec![status(true)], others, ..Status::default() };
        s.handle(at(1), Input::Node { node: NodeId(node), from: FromNode::Status(status) });
    };
    let asks = |s: &mut Scheduler, id| {
        s.handle(at(2), Input::Submit(Box::new(ask(id, vec![1; 40], 10))));
        let node = sent(&outputs(s)).first().map(|sent| sent.0);
        s.handle(at(2), Input::Cancel(RequestId(id)));
        outputs(s);
        node
    };
    let mut s = scheduler(2);
    for (id, (first, second, expected)) in
        [(0, 2, Some(0)), (2, 0, Some(1)), (1000, 0, Some(1)), (1000, u32::MAX, None), (0, 1000, Some(0))]
            .into_iter()
            .enumerate()
    {
        beat(&mut s, 0, first);
        beat(&mut s, 1, second);
        assert_eq!(asks(&mut s, id as u64 + 1), expected, "{first} and {second}");
    }
}

/// A node guesses its pace until it has worked; then it corrects itself, and what we had made of its guess is not
/// counted on top.
#[test]
fn a_nodes_own_correction_is_not_counted_twice() {
    let mut s = scheduler(1);
    let true_pace = Duration::from_millis(100);
    let mut now = 1000;
    let mut work = |s: &mut Scheduler, id| {
        s.handle(at(now), Input::Submit(Box::new(ask(id, vec![1], 10))));
        for position in 0..10 {
            now += 100;
            token(s, at(now), 0, id, 0, position);
        }
        let end = Event::Finished { reason: Finish::Stop, text: String::new(), usage: Usage::default() };
        say(s, at(now), 0, id, 0, end);
        outputs(s);
        s.survey(at(now))[0].models[0].token_time
    };
    for id in 0..30 {
        work(&mut s, id);
    }
    let found = work(&mut s, 30);
    assert!(found.abs_diff(true_pace) < Duration::from_millis(2), "{found:?}");
    let rates =
        Rates { prefill_tokens_per_s: 100.0, token_time_alone: true_pace, token_time_full: true_pace * 2 };
    let model = ModelStatus { rates: Some(rates), ..status(true) };
    let from = FromNode::Status(Status { models: vec![model], ..Status::default() });
    s.handle(at(32_000), Input::Node { node: NodeId(0), from });
    for id in 100..105 {
        let found = work(&mut s, id);
        assert!(found.abs_diff(true_pace) < Duration::from_millis(5), "{found:?}");
    }
}
