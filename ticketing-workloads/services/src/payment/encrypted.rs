//! The way to a provider over TLS: certificates are verified, redirects are not followed, a connection is there within
//! a bound or nothing was sent, and none is used for long: what DNS says of a provider's name changes.

use crate::http_client::{self, HttpAnswer, HttpCall, HttpError};
use axum::body::Bytes;
use axum::http::{HeaderValue, Method, Request, Uri, header};
use contract::TimeoutSettings;
use futures::future::BoxFuture;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use resilience::Dependency;
use rustls::ClientConfig;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tower::{Service, ServiceExt};

/// Time to open a connection, TCP and TLS, if the policy names none. A packet that was lost is sent again after a
/// second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may wait for its next request; providers close theirs later.
const IDLE: Duration = Duration::from_secs(20);
/// How long a connection is used, less up to a fifth by chance, so that not all are opened anew at the same moment.
const AGE: Duration = Duration::from_secs(60);
/// Idle connections that are kept: as many requests as there are at once.
const MOST_IDLE: usize = 32;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type OverTls = Client<Connector, Full<Bytes>>;

/// A provider over TLS.
pub struct Encrypted {
    base: String,
    connector: Connector,
    age: Duration,
    /// With its connections, which end with it, or with the requests on them; and until when it is used.
    client: Mutex<Option<(OverTls, Instant)>>,
}

/// Opens connections.
#[derive(Clone)]
struct Connector {
    config: Arc<ClientConfig>,
    /// Whose policy says how long it may take.
    dependency: Option<&'static Dependency>,
}

/// How long it may take to open a connection: less than an attempt, at the end of which nobody could say that nothing
/// was sent.
fn connect_bound(timeouts: Option<&TimeoutSettings>) -> Duration {
    let Some(timeouts) = timeouts else { return CONNECT_TIMEOUT };
    let wanted = timeouts.connect_ms.map_or(CONNECT_TIMEOUT, Duration::from_millis);
    wanted.min(Duration::from_millis(timeouts.per_try_ms) * 9 / 10)
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let bound = connect_bound(self.dependency.map(Dependency::timeouts).as_ref());
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // Shared by the addresses of the name: one that takes no connection leaves time for the next one.
        tcp.set_connect_timeout(Some(bound));
        let mut tls = HttpsConnector::from((tcp, Arc::clone(&self.config)));
        tls.enforce_https();
        Box::pin(async move {
            let late = |_| format!("there was none within {} ms", bound.as_millis());
            timeout(bound, tls.oneshot(uri)).await.map_err(late)?
        })
    }
}

impl Encrypted {
    /// The provider at `base`, which is of https.
    pub fn new(base: &str, config: ClientConfig, dependency: Option<&'static Dependency>) -> Self {
        let connector = Connector { config: Arc::new(config), dependency };
        Self { base: base.trim_end_matches('/').to_owned(), connector, age: AGE, client: Mutex::default() }
    }

    fn client(&self) -> OverTls {
        let now = Instant::now();
        let mut kept = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((client, until)) = kept.as_ref()
            && now < *until
        {
            return client.clone();
        }
        let new = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MOST_IDLE)
            .build(self.connector.clone());
        *kept = Some((OverTls::clone(&new), now + self.age.mul_f64(1.0 - 0.2 * rand::random::<f64>())));
        new
    }

    /// One request, with this header `Authorization`; the answer has at most `most` bytes.
    pub async fn send(
        &self,
        call: HttpCall,
        authorization: Option<String>,
        most: usize,
    ) -> Result<HttpAnswer, HttpError> {
        let HttpCall { method, path, headers, body } = call;
        let not_sent = |why: String| HttpError::NotSent(why);
        let uri: Uri = format!("{}{path}", self.base).parse().map_err(|error| not_sent(format!("{error}")))?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        if request.method() == Method::GET {
            request.headers_mut().remove(header::CONTENT_TYPE);
        }
        if let Some(text) = authorization {
            let value = HeaderValue::from_str(&text);
            let mut value = value.map_err(|_| not_sent("the API key is no plain text".to_owned()))?;
            value.set_sensitive(true);
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        let answer = self.client().request(request).await.map_err(|error| {
            let words = http_client::in_full(&error);
            if error.is_connect() { not_sent(words) } else { HttpError::broken(words) }
        })?;
        let (parts, body) = answer.into_parts();
        let body = http_client::collect(body, most).await?;
        Ok(HttpAnswer { status: parts.status, headers: parts.headers, body, from_ejected: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_certificate::server_config;
    use rustls::RootCertStore;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket};

    fn timeouts(per_try_ms: u64, connect_ms: Option<u64>) -> TimeoutSettings {
        TimeoutSettings { request_ms: 10_000, per_try_ms, connect_ms }
    }

    /// An attempt that ended before its connection was there was in doubt.
    #[rstest::rstest]
    #[case::none_is_said(3_000, None, 2_000)]
    #[case::it_is_said(3_000, Some(500), 500)]
    #[case::a_short_attempt(1_000, None, 900)]
    #[case::as_long_as_the_attempt(3_000, Some(3_000), 2_700)]
    fn a_connection_is_there_before_its_attempt_ends(
        #[case] per_try_ms: u64,
        #[case] connect_ms: Option<u64>,
        #[case] expected_ms: u128,
    ) {
        assert_eq!(connect_bound(Some(&timeouts(per_try_ms, connect_ms))).as_millis(), expected_ms);
        assert_eq!(connect_bound(None), CONNECT_TIMEOUT);
    }

    /// A listener whose queue is full: the kernel drops what more knocks, and nobody ever takes it.
    async fn takes_nobody() -> (SocketAddr, impl Sized) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
            queued.push(stream.unwrap());
        }
        (address, (listener, queued))
    }

    /// The kernel takes the connection, and nobody says a word on it.
    async fn says_nothing() -> (SocketAddr, impl Sized) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        (listener.local_addr().unwrap(), listener)
    }

    fn config(roots: RootCertStore) -> ClientConfig {
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    }

    /// Nothing was sent, so a confirmation is not in doubt.
    #[tokio::test]
    async fn a_connection_that_does_not_come_about_is_given_up_and_nothing_was_sent() {
        let (full, _queue) = takes_nobody().await;
        let (silent, _listener) = says_nothing().await;
        for address in [full, silent] {
            let way = Encrypted::new(&format!("https://{address}"), config(RootCertStore::empty()), None);
            let asked = timeout(Duration::from_secs(20), way.send(HttpCall::get("/"), None, 1_000)).await;
            let error = asked.expect("it is given up").unwrap_err();
            assert!(matches!(error, HttpError::NotSent(_)), "{address}: {error}");
        }
    }

    /// A server that keeps its connections, and counts them; and what trusts it. Each answer has `size` bytes.
    async fn server(size: usize) -> (String, ClientConfig, Arc<AtomicUsize>) {
        let (served, certificate) = server_config("localhost");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(served));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let connections = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, Ordering::SeqCst);
                let mut stream = acceptor.accept(stream).await.unwrap();
                tokio::spawn(async move {
                    let mut request = [0; 4_096];
                    while stream.read(&mut request).await.is_ok_and(|length| length > 0) {
                        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n{}", "x".repeat(size));
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()).unwrap();
        (base, config(roots), connections)
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_it_is_old() {
        let (base, config, connections) = server(10).await;
        let mut way = Encrypted::new(&base, config, None);
        for _ in 0..5 {
            way.send(HttpCall::get("/"), None, 10).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::SeqCst), 1);
        way.age = Duration::ZERO;
        way.client = Mutex::default();
        for _ in 0..5 {
            way.send(HttpCall::get("/"), None, 10).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::SeqCst), 6);
    }

    #[tokio::test]
    async fn an_answer_is_bounded() {
        let (base, config, _) = server(1_001).await;
        let way = Encrypted::new(&base, config, None);
        way.send(HttpCall::get("/"), None, 1_001).await.unwrap();
        let error = way.send(HttpCall::get("/"), None, 1_000).await.unwrap_err();
        assert!(matches!(error, HttpError::TooLarge { most: 1_000 }), "{error}");
    }
}
