//! What a decision costs as the pool grows: `cargo bench -p weir-scheduler`.
//!
//! For each size of the pool: until a request is placed, together with what another's end costs, in the steady state.
//! Fails if the cost grows faster than the square root of the pool.
#[path = "../tests/suite/samples.rs"]
mod samples;

use samples::{ask, profile};
use std::collections::VecDeque;
use std::time::Instant;
use weir_scheduler::{
    Event, Fastest, Finish, FromNode, Input, Limits, NodeId, Output, Profile, Scheduler, Time, ToNode, Usage,
};

fn main() {
    println!("| nodes | placed and ended, p50 | p99 |\n| --- | --- | --- |");
    let [few, .., many] = [10, 100, 1000, 10_000].map(decision_ns);
    assert!(many < few * 32, "it grows faster than the square root of the pool: {few} ns to {many} ns");
}

/// Nanoseconds for a request to be placed and to end, with `n` nodes of which half are busy.
fn decision_ns(n: u64) -> u64 {
    let mut s = Scheduler::new(Limits { waiting_max: 1 << 20, ..Limits::default() }, Box::new(Fastest), 1);
    for id in 0..n {
        let said = Profile { identity: id + 1, ..profile("n", 16) };
        s.handle(Time::ZERO, Input::Connected { node: NodeId(id), profile: said });
    }
    let prompt: Vec<u32> = (0..600).collect();
    let mut live = VecDeque::new();
    let (mut times, mut id) = (Vec::new(), 0);
    let rounds = n * 8 + 3000;
    while id < rounds {
        let now = Time(id * 1000);
        let mut ask = ask(id, prompt.clone(), 100);
        ask.prompt[599] = id as u32;
        let began = Instant::now();
        s.handle(now, Input::Submit(Box::new(ask)));
        times.push(began.elapsed().as_nanos() as u64);
        while let Some(output) = s.poll() {
            if let Output::Send { node, message: ToNode::Generate(ask) } = output {
                live.push_back((node, ask.request));
            }
        }
        if live.len() as u64 > n * 8 {
            let (node, request) = live.pop_front().expect("there are many");
            let usage = Usage::default();
            let event = Event::Finished { reason: Finish::Stop, text: String::new(), usage };
            let began = Instant::now();
            s.handle(now, Input::Node { node, from: FromNode::Event { request, attempt: 0, event } });
            *times.last_mut().expect("pushed above") += began.elapsed().as_nanos() as u64;
            while s.poll().is_some() {}
        }
        id += 1;
    }
    let mut last = times.split_off(times.len() - 2000);
    last.sort_unstable();
    println!("| {n} | {:.1} us | {:.1} us |", last[1000] as f64 / 1e3, last[1980] as f64 / 1e3);
    last[1000]
}
