//! Links, of every sort: what holds for one holds for the others.
use crate::samples::{self, Rng};
use std::future::Future;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;
use weir_scheduler::{RequestId, Token};
use weir_transport::{
    DialError, Dialer, Fingerprint, Frame, Identity, Link, LinkError, Listener, PublicKey, Stream, Urgency,
};

fn frame(n: u32) -> Frame {
    Frame::cancel(RequestId(1), n)
}

/// Two ends of a link.
struct Ends {
    node: Link,
    scheduler: Link,
}

/// Must live as long as the link.
type Endpoints = (Listener, Dialer);

async fn over_quic() -> (Ends, Endpoints) {
    let cluster = Identity::generate().unwrap();
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &cluster).unwrap();
    let dialer = Dialer::new().unwrap();
    let addresses = ["127.0.0.1:1".to_owned(), listener.address().unwrap().to_string()];
    let pinned = cluster.public().fingerprint();
    let node = dialer.dial(&addresses[1..], pinned).await.unwrap();
    let (scheduler, from) = listener.accept().await.unwrap();
    assert!(from.ip().to_canonical().is_loopback());
    (Ends { node, scheduler }, (listener, dialer))
}

async fn over_web_transport() -> (Ends, Endpoints) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &Identity::generate().unwrap()).unwrap();
    let dialer = Dialer::new().unwrap();
    let address = listener.address().unwrap().to_string();
    let certificate = listener.web_certificate().hash(SystemTime::now());
    let (node, scheduler) = tokio::join!(dialer.dial_web(&address, certificate), listener.accept());
    let (node, (scheduler, _)) = (node.unwrap(), scheduler.unwrap());
    assert!(node.is_web() && scheduler.is_web());
    (Ends { node, scheduler }, (listener, dialer))
}

fn in_memory() -> Ends {
    let (node, scheduler) = Link::in_memory();
    Ends { node, scheduler }
}

/// A stream that a frame has come through: the node's end and the scheduler's.
async fn opened(ends: &Ends) -> (Stream, Stream) {
    let mut here = ends.node.open().await.unwrap();
    here.send.send(frame(0)).await.unwrap();
    let mut there = ends.scheduler.accept().await.unwrap();
    assert_eq!(there.receive.next().await, Ok(Some(frame(0))));
    (here, there)
}

/// Runs `test` on a link of each sort.
fn check<F: Future<Output = ()>>(test: impl Fn(Ends) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let within = Duration::from_secs(60);
    runtime.block_on(async {
        timeout(within, test(in_memory())).await.expect("in memory");
        let (ends, _endpoints) = over_quic().await;
        timeout(within, test(ends)).await.expect("over QUIC");
        let (ends, _endpoints) = over_web_transport().await;
        timeout(within, test(ends)).await.expect("over WebTransport");
    });
}

#[test]
fn frames_arrive_in_order_and_the_end_is_seen() {
    check(|ends| async move {
        let mut here = ends.node.open().await.unwrap();
        let sends = tokio::spawn(async move {
            for n in 0..1000 {
                here.send.send(frame(n)).await.unwrap();
            }
            here.send.finish();
            here.receive.next().await
        });
        let mut there = ends.scheduler.accept().await.unwrap();
        for n in 0..1000 {
            assert_eq!(there.receive.next().await.unwrap(), Some(frame(n)));
        }
        assert_eq!(there.receive.next().await, Ok(None));
        there.send.send(frame(7)).await.unwrap();
        assert_eq!(sends.await.unwrap(), Ok(Some(frame(7))));
    });
}

#[test]
fn a_slow_reader_holds_up_its_own_stream_only() {
    check(|ends| async move {
        let mut slow = ends.node.open().await.unwrap();
        slow.send.send(frame(0)).await.unwrap();
        let _unread = ends.scheduler.accept().await.unwrap();
        let text = "x".repeat(1000);
        let token = Token { position: 0, id: 1, text, logprob: None };
        let large = Frame::tokens(RequestId(1), 0, vec![token]);
        let mut sent = 0;
        while timeout(Duration::from_millis(200), slow.send.send(large.clone())).await.is_ok() {
            sent += 1;
            assert!(sent < 100, "what is under way must be bounded");
        }
        let mut quick = ends.node.open().await.unwrap();
        quick.send.send(frame(0)).await.unwrap();
        let mut read = ends.scheduler.accept().await.unwrap();
        for n in 0..1000 {
            assert_eq!(read.receive.next().await.unwrap(), Some(frame(n)));
            quick.send.send(frame(n + 1)).await.unwrap();
        }
        // Given up halfway, so it can't go on.
        drop(slow);
    });
}

#[test]
fn hundreds_of_stalled_readers_leave_room_for_others() {
    check(|ends| async move {
        let mut stalled = Vec::new();
        for _ in 0..300 {
            let mut one = ends.scheduler.open().await.unwrap();
            one.send.send(frame(0)).await.unwrap();
            let mut there = ends.node.accept().await.unwrap();
            // As a node answers: more than anybody reads.
            let task = tokio::spawn(async move { while there.send.send(frame(1)).await.is_ok() {} });
            stalled.push((one, task));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut here = ends.scheduler.open().await.unwrap();
        here.send.send(frame(5)).await.unwrap();
        let mut there = ends.node.accept().await.unwrap();
        assert_eq!(there.receive.next().await, Ok(Some(frame(5))));
        there.send.send(frame(6)).await.unwrap();
        assert_eq!(here.receive.next().await, Ok(Some(frame(6))));
        for (stream, task) in stalled {
            drop(stream);
            task.await.unwrap();
        }
    });
}

#[test]
fn dropping_a_stream_resets_it() {
    check(|ends| async move {
        let (here, mut there) = opened(&ends).await;
        drop(here);
        assert_eq!(there.receive.next().await, Err(LinkError::Reset));
        // The other half's news may take a moment more.
        let refused = async {
            while there.send.send(frame(0)).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(5), refused).await.unwrap();
        assert_eq!(there.send.send(frame(0)).await, Err(LinkError::Reset));
    });
}

#[test]
fn closing_a_link_ends_all() {
    check(|ends| async move {
        let (mut here, mut there) = opened(&ends).await;
        let waits = tokio::spawn(async move { there.receive.next().await });
        ends.node.close("pulled the plug");
        let closed = LinkError::Closed("pulled the plug".into());
        assert_eq!(waits.await.unwrap(), Err(closed.clone()));
        assert_eq!(here.receive.next().await, Err(closed.clone()));
        ends.scheduler.closed().await;
        assert_eq!(ends.scheduler.accept().await.unwrap_err(), closed.clone());
        assert_eq!(ends.scheduler.open().await.unwrap_err(), closed);
    });
    check(|Ends { node, scheduler }| async move {
        drop(node);
        assert!(matches!(scheduler.accept().await, Err(LinkError::Closed(_))));
    });
}

/// Frames from empty to megabytes, so that they begin and end anywhere in packets and chunks.
#[test]
fn frames_of_all_sizes_arrive_whole() {
    check(|ends| async move {
        let mut rng = Rng(11);
        let sizes: Vec<usize> = (0..300).map(|_| 1usize << rng.below(18)).chain([7 << 20 >> 2]).collect();
        let frames: Vec<Frame> = sizes
            .iter()
            .map(|size| {
                let mut ask = samples::ask();
                ask.prompt = (0..*size as u32).collect();
                Frame::generate(ask).unwrap()
            })
            .collect();
        let expected = frames.clone();
        let mut here = ends.node.open().await.unwrap();
        let sends = tokio::spawn(async move {
            for frame in frames {
                here.send.send(frame).await.unwrap();
            }
            here.send.finish();
            here.receive.next().await
        });
        let mut there = ends.scheduler.accept().await.unwrap();
        for (at, frame) in expected.iter().enumerate() {
            // Giving up and trying again loses nothing.
            let got = loop {
                if let Ok(got) = timeout(Duration::from_micros(50), there.receive.next()).await {
                    break got.unwrap().unwrap();
                }
            };
            assert!(got == *frame, "frame {at} differs");
        }
        assert_eq!(there.receive.next().await, Ok(None));
        there.send.finish();
        assert_eq!(sends.await.unwrap(), Ok(None));
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clusters_key_is_refused() {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &Identity::generate().unwrap()).unwrap();
    let address = [listener.address().unwrap().to_string()];
    let error = Dialer::new().unwrap().dial(&address, Fingerprint([7; 32])).await.unwrap_err();
    assert_eq!(error, DialError::OtherCluster(address[0].clone()));
    let nowhere = ["no-such-host.invalid:1".to_owned()];
    let error = Dialer::new().unwrap().dial(&nowhere, Fingerprint([7; 32])).await.unwrap_err();
    assert!(matches!(error, DialError::Unreachable(why) if why.contains("no-such-host")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ends_of_a_link_have_a_binding_of_their_own() {
    check_binding(over_quic().await, over_quic().await);
    check_binding(over_web_transport().await, over_web_transport().await);
    check_binding(over_web_transport().await, over_quic().await);
    assert_eq!(Link::in_memory().0.binding(), None);
}

fn check_binding((first, _endpoints): (Ends, Endpoints), (second, _others): (Ends, Endpoints)) {
    let binding = |link: &Link| link.binding().unwrap();
    assert_eq!(binding(&first.node), binding(&first.scheduler));
    assert_ne!(binding(&first.node), binding(&second.node));
    let node = Identity::generate().unwrap();
    let proof = node.prove(&binding(&first.node));
    assert_eq!(PublicKey::proved(&proof, &binding(&first.scheduler)), Ok(node.public()));
    assert!(PublicKey::proved(&proof, &binding(&second.scheduler)).is_err(), "a hello replayed elsewhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sessions_of_one_port_have_bindings_of_their_own() {
    let (first, (listener, dialer)) = over_web_transport().await;
    let address = listener.address().unwrap().to_string();
    let certificate = listener.web_certificate().hash(SystemTime::now());
    let (node, scheduler) = tokio::join!(dialer.dial_web(&address, certificate), listener.accept());
    let (node, (scheduler, _)) = (node.unwrap(), scheduler.unwrap());
    assert_eq!(node.binding(), scheduler.binding());
    assert_ne!(node.binding(), first.node.binding());
    let error = dialer.dial_web(&address, [7; 32]).await.unwrap_err();
    assert!(matches!(&error, DialError::Unreachable(why) if why.contains("pinned")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_urgent_overtakes_what_waits_to_be_sent() {
    let (ends, _endpoints) = over_quic().await;
    let mut streams = Vec::new();
    for urgency in [Urgency::Background, Urgency::Control] {
        let mut here = ends.scheduler.open().await.unwrap();
        here.send.set_urgency(urgency);
        here.send.send(frame(0)).await.unwrap();
        streams.push((here, ends.node.accept().await.unwrap()));
    }
    let (mut urgent, mut urgent_there) = streams.pop().unwrap();
    let (mut bulk, mut bulk_there) = streams.pop().unwrap();
    // A node may be ahead of its reader by a window's worth: that much waits to be sent.
    let mut ask = samples::ask();
    ask.prompt = vec![1; 40_000];
    let large = Frame::generate(ask).unwrap();
    let sent = tokio::spawn(async move {
        bulk.send.send(large).await.unwrap();
        bulk.send.finish();
    });
    tokio::task::yield_now().await;
    urgent.send.send(frame(1)).await.unwrap();
    urgent_there.receive.next().await.unwrap();
    assert_eq!(urgent_there.receive.next().await, Ok(Some(frame(1))));
    bulk_there.receive.next().await.unwrap();
    assert!(bulk_there.receive.next().await.unwrap().is_some());
    sent.await.unwrap();
}
