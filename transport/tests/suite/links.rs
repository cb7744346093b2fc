//! Links within a process.
use std::time::Duration;
use weir_scheduler::RequestId;
use weir_transport::{Frame, Link, LinkError};

fn frame(n: u32) -> Frame {
    Frame::cancel(RequestId(1), n)
}

#[tokio::test]
async fn frames_arrive_in_order_and_the_end_is_seen() {
    let (a, b) = Link::in_memory();
    let mut here = a.open().await.unwrap();
    let mut there = b.accept().await.unwrap();
    let sends = tokio::spawn(async move {
        for n in 0..1000 {
            here.send.send(frame(n)).await.unwrap();
        }
        here.send.finish();
        here.receive.next().await
    });
    for n in 0..1000 {
        assert_eq!(there.receive.next().await.unwrap(), Some(frame(n)));
    }
    assert_eq!(there.receive.next().await, Ok(None));
    there.send.send(frame(7)).await.unwrap();
    assert_eq!(sends.await.unwrap(), Ok(Some(frame(7))));
}

#[tokio::test]
async fn a_slow_reader_holds_up_its_own_stream_only() {
    let (a, b) = Link::in_memory();
    let mut slow = a.open().await.unwrap();
    let mut quick = a.open().await.unwrap();
    let _unread = b.accept().await.unwrap();
    let mut read = b.accept().await.unwrap();
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(20), slow.send.send(frame(0))).await.is_ok() {
        sent += 1;
        assert!(sent < 100, "what is under way must be bounded");
    }
    for n in 0..1000 {
        quick.send.send(frame(n)).await.unwrap();
        assert_eq!(read.receive.next().await.unwrap(), Some(frame(n)));
    }
}

#[tokio::test]
async fn dropping_a_stream_resets_it_and_closing_a_link_ends_all() {
    let (a, b) = Link::in_memory();
    let here = a.open().await.unwrap();
    let mut there = b.accept().await.unwrap();
    drop(here);
    assert_eq!(there.receive.next().await, Err(LinkError::Reset));
    assert_eq!(there.send.send(frame(0)).await, Err(LinkError::Reset));

    let mut here = a.open().await.unwrap();
    let mut there = b.accept().await.unwrap();
    let waits = tokio::spawn(async move { there.receive.next().await });
    a.close("pulled the plug");
    let closed = LinkError::Closed("pulled the plug".into());
    assert_eq!(waits.await.unwrap(), Err(closed.clone()));
    assert_eq!(here.receive.next().await, Err(closed.clone()));
    assert_eq!(b.accept().await.unwrap_err(), closed.clone());
    assert_eq!(b.open().await.unwrap_err(), closed);

    let (a, b) = Link::in_memory();
    drop(a);
    assert!(matches!(b.accept().await, Err(LinkError::Closed(_))));
}
