//! Connections: how many, and how long each may take. A client who is slow or gone holds up nobody.

use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::api::{self, App};
use crate::interrupt::Interrupt;

/// The most connections at once; more wait until one ends.
const CONNECTIONS: usize = 256;
/// How often it is looked whether somebody asked to stop.
const LOOK: Duration = Duration::from_millis(50);
/// How long an answer that was ended has to be sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Takes connections until a signal asks to stop, then lets what is being answered end.
pub(super) async fn accept(app: Arc<App>, listener: TcpListener, interrupt: &Interrupt) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = api::router(app.clone());
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let patience = app.settings.timeout;
    // of several errors in a row the first is told
    let mut fails = false;
    loop {
        let next = async {
            let Ok(place) = places.clone().acquire_owned().await else { return Err(io::Error::other("closed")) };
            Ok((listener.accept().await?.0, place))
        };
        let (stream, place) = tokio::select! {
            next = next => match next {
                Ok(next) => next,
                // a client that was gone at once
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    // no free file descriptor, as a rule
                    if !fails {
                        app.console.warning(format_args!("connections cannot be taken, and wait: {error}"));
                    }
                    fails = true;
                    sleep(LOOK).await;
                    continue;
                }
            },
            () = asked(interrupt) => break,
        };
        fails = false;
        // an event is sent when it is there
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(patience)
            .serve_connection(TokioIo::new(Patient::new(stream, patience)), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // what ends a connection early is the client's matter
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    app.stopping.store(true, Ordering::Relaxed);
    let busy = app.settings.queue - app.places.available_permits();
    if busy > 0 {
        let grace = app.settings.grace.as_secs();
        app.console.line(format_args!(
            "stopping: {busy} requests are being answered, and have {grace} s; a second signal stops at once"
        ));
    }
    let ended = graceful.shutdown();
    tokio::pin!(ended);
    if timeout(app.settings.grace, &mut ended).await.is_err() {
        app.stop.store(true, Ordering::Relaxed);
        _ = timeout(LAST_WORDS, &mut ended).await;
    }
    Ok(())
}

async fn asked(interrupt: &Interrupt) {
    while interrupt.asked().is_none() {
        sleep(LOOK).await;
    }
}

/// A connection whose client has to read: a write that waits too long is an error.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    /// Running where a write waits.
    deadline: Pin<Box<Sleep>>,
    waits: bool,
}

impl Patient {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, deadline: Box::pin(sleep(patience)), waits: false }
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, bytes) {
            Poll::Ready(written) => {
                self.waits = false;
                Poll::Ready(written)
            }
            Poll::Pending => {
                if !self.waits {
                    self.waits = true;
                    let deadline = Instant::now() + self.patience;
                    self.deadline.as_mut().reset(deadline);
                }
                ready!(self.deadline.as_mut().poll(context));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
