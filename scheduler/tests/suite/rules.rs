//! Single rules.
use crate::samples::{MODEL, ask, profile};
use std::time::Duration;
use weir_scheduler::{
    Event, Failure, FailureKind, Fastest, Finish, FromNode, Input, Limits, ModelStatus, NodeId, Output,
    Priority, RequestId, Scheduler, Status, Time, ToNode, Token, Usage,
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
    let model = ModelStatus {
        model: MODEL,
        alive,
        running: u32::from(alive),
        waiting: 0,
        queued_tokens: 0,
        kv_blocks_free: 0,
        steps: 0,
        rates: None,
    };
    let from = FromNode::Status(Status { draining: false, models: vec![model] });
    scheduler.handle(now, Input::Node { node: NodeId(node), from });
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
