//! Asks over real sockets, of servers that behave well and badly.

use super::*;
use crate::checks::tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

const TIMEOUT: Duration = Duration::from_millis(400);

/// What an ask gives.
async fn ask(to: SocketAddr, what: &Ask, timeout: Duration) -> Result<(), AskError> {
    super::ask(to, what, timeout).await.result
}

#[tokio::test]
async fn who_answers_in_whatever_way_is_reached() {
    let reached = async |to, what: &Ask| super::ask(to, what, Duration::from_millis(100)).await.reached.is_some();
    let (hangs, _) = server("127.0.0.1:0", async |_stream| std::future::pending().await).await;
    assert!(reached(hangs, &Ask::Tcp).await && reached(hangs, &http(vec![200..=399])).await);
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refuses = free.local_addr().unwrap();
    drop(free);
    assert!(reached(refuses, &Ask::Tcp).await, "it is refused");
    // Its queue of connections is full, and Linux drops what comes after.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = socket.listen(0).unwrap();
    let to = full.local_addr().unwrap();
    let _first = TcpStream::connect(to).await.unwrap();
    assert!(!reached(to, &Ask::Tcp).await, "nobody says anything");
}

/// A server that gives each connection to `serve`, and how many it has had.
async fn server<F>(at: &str, serve: impl Fn(TcpStream) -> F + Send + 'static) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind(at).await.unwrap();
    let (address, connections) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            seen.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(serve(stream));
        }
    });
    (address, connections)
}

/// Reads the head of a request.
async fn request_head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// A server that gives this answer, and keeps the connection open if it is told to.
async fn answering(answer: impl Into<Vec<u8>>, stays: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let answer: Arc<[u8]> = answer.into().into();
    server("127.0.0.1:0", move |mut stream| {
        let answer = Arc::clone(&answer);
        async move {
            request_head(&mut stream).await?;
            stream.write_all(&answer).await?;
            if stays {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    })
    .await
}

fn http(expected: Vec<RangeInclusive<u16>>) -> Ask {
    Ask::Http { request: request("/ready?a=b", "web.n.svc:8080"), expected, tls: None }
}

/// The label of what an ask gives: `ok`, or that of the error.
async fn label(to: SocketAddr, what: &Ask) -> &'static str {
    ask(to, what, TIMEOUT).await.as_ref().err().map_or("ok", AskError::label)
}

fn chunked(chunks: usize) -> Vec<u8> {
    let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    (0..chunks).for_each(|_| answer.extend_from_slice(b"1\r\nx\r\n"));
    answer
}

#[rstest::rstest]
#[case::ok(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_vec(), true, "ok")]
#[case::no_content(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(), true, "ok")]
#[case::redirect(b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n".to_vec(), true, "ok")]
#[case::interim(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec(), true, "ok")]
#[case::until_close(b"HTTP/1.0 200 OK\r\n\r\nok".to_vec(), false, "ok")]
#[case::chunked([chunked(3), b"0\r\n\r\n".to_vec()].concat(), true, "ok")]
#[case::unavailable(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".to_vec(), true, "status")]
#[case::not_found(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec(), true, "status")]
#[case::slow_body_of_an_error(b"HTTP/1.1 503 No\r\ncontent-length: 3\r\n\r\nok".to_vec(), true, "status")]
#[case::slow_head(b"HTTP/1.1 200 OK\r\n".to_vec(), true, "timeout")]
#[case::slow_body(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok".to_vec(), true, "timeout")]
#[case::closes_in_the_middle(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok".to_vec(), false, "unreachable")]
#[case::says_nothing(Vec::new(), false, "unreachable")]
#[case::no_http(b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(), true, "invalid")]
#[case::upgrades(b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec(), true, "invalid")]
#[case::hesitates(b"HTTP/1.1 100 Continue\r\n\r\n".repeat(100), true, "invalid")]
#[case::bad_chunks([chunked(1), b"xyz\r\n".to_vec()].concat(), true, "invalid")]
#[case::many_headers(
    [b"HTTP/1.1 200 OK\r\n".to_vec(), b"a: b\r\n".repeat(100), b"\r\n".to_vec()].concat(), true, "invalid"
)]
#[tokio::test]
async fn an_answer_is_told_from_what_is_none(#[case] answer: Vec<u8>, #[case] stays: bool, #[case] expected: &str) {
    let (to, connections) = answering(answer, stays).await;
    assert_eq!(label(to, &http(vec![200..=399])).await, expected);
    assert_eq!(connections.load(Ordering::Relaxed), 1, "it asks once, and follows nothing");
}

#[rstest::rstest]
#[case(vec![200..=399], "ok")]
#[case(vec![204..=204], "status")]
#[case(vec![404..=404, 300..=302], "ok")]
#[tokio::test]
async fn the_policy_says_which_status_is_healthy(#[case] expected: Vec<RangeInclusive<u16>>, #[case] label_: &str) {
    let (to, _) = answering(b"HTTP/1.1 301 Moved\r\ncontent-length: 0\r\n\r\n".to_vec(), true).await;
    assert_eq!(label(to, &http(expected)).await, label_);
}

/// Writes without end, and says how many bytes it got rid of.
async fn endless(begin: &'static [u8], more: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    let (to, _) = server("127.0.0.1:0", move |mut stream| {
        let count = Arc::clone(&count);
        async move {
            request_head(&mut stream).await?;
            stream.write_all(begin).await?;
            let more = more.repeat(1024);
            loop {
                stream.write_all(&more).await?;
                count.fetch_add(more.len(), Ordering::Relaxed);
            }
        }
    })
    .await;
    (to, written)
}

/// What the system may hold of a connection besides what is read of it.
const IN_BETWEEN: usize = 16 * 1024 * 1024;

#[rstest::rstest]
#[case::body(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", b"x", "ok")]
#[case::body_until_close(b"HTTP/1.1 200 OK\r\n\r\n", b"x", "ok")]
#[case::chunks(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "ok")]
#[case::one_chunk(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffff\r\n", b"x", "ok")]
#[case::head(b"HTTP/1.1 200 OK\r\na: ", b"x", "invalid")]
#[case::chunk_size(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x", "invalid")]
#[tokio::test]
async fn what_never_ends_is_not_read_to_its_end(
    #[case] begin: &'static [u8],
    #[case] more: &'static [u8],
    #[case] expected: &str,
) {
    let (to, written) = endless(begin, more).await;
    assert_eq!(label(to, &http(vec![200..=399])).await, expected);
    let now = written.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let later = written.load(Ordering::Relaxed);
    assert!(now < IN_BETWEEN && later < IN_BETWEEN, "{now} {later}: the connection was closed");
}

/// Sends each byte by itself, the last one again and again.
async fn dripping(answer: &'static [u8]) -> SocketAddr {
    let (to, _) = server("127.0.0.1:0", move |mut stream| async move {
        stream.set_nodelay(true)?;
        request_head(&mut stream).await?;
        let last = answer.last().into_iter().cycle();
        for byte in answer.iter().chain(last) {
            stream.write_all(&[*byte]).await?;
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        Ok(())
    })
    .await;
    to
}

#[rstest::rstest]
#[case::head(b"HTTP/1.1 200 OK\r\na: b", "invalid")]
#[case::body(b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\nx", "ok")]
#[tokio::test]
async fn who_sends_each_byte_by_itself_is_not_listened_to_for_long(
    #[case] answer: &'static [u8],
    #[case] expected: &str,
) {
    let to = dripping(answer).await;
    let result = ask(to, &http(vec![200..=399]), Duration::from_secs(20)).await;
    assert_eq!(result.as_ref().err().map_or("ok", AskError::label), expected);
}

#[tokio::test]
async fn who_does_not_answer_is_given_up() {
    let (to, _) = server("127.0.0.1:0", async |_stream| std::future::pending().await).await;
    let began = tokio::time::Instant::now();
    let error = ask(to, &http(vec![200..=399]), TIMEOUT).await.unwrap_err();
    assert!(error.is_silence() && began.elapsed() < TIMEOUT * 3);
    assert_eq!(error.to_string(), format!("{to} gave no complete answer within 400ms"));
}

#[tokio::test]
async fn a_connection_is_enough_for_tcp() {
    let (to, _) = server("127.0.0.1:0", async |_stream| Ok(())).await;
    assert_eq!(label(to, &Ask::Tcp).await, "ok");
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = free.local_addr().unwrap();
    drop(free);
    let error = ask(to, &Ask::Tcp, TIMEOUT).await.unwrap_err();
    assert_eq!(error.label(), "unreachable");
    assert!(error.to_string().starts_with(&format!("{to} cannot be reached: Connection refused")), "{error}");
}

#[tokio::test]
async fn an_endpoint_is_asked_over_ipv6_for_the_name_of_the_service() {
    let (heads, mut head) = tokio::sync::mpsc::unbounded_channel();
    let (to, _) = server("[::1]:0", move |mut stream| {
        let heads = heads.clone();
        async move {
            let head = request_head(&mut stream).await?;
            let _ = heads.send(head);
            stream.write_all(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await
        }
    })
    .await;
    let error = ask(to, &http(vec![200..=399]), TIMEOUT).await.unwrap_err();
    assert_eq!(error.to_string(), format!("[::1]:{} answered with HTTP 503", to.port()));
    let head = head.recv().await.unwrap();
    assert!(
        head.starts_with("GET /ready?a=b HTTP/1.1\r\nhost: web.n.svc:8080\r\nuser-agent: resilience-operator/"),
        "{head}"
    );
    assert!(head.ends_with("connection: close\r\n\r\n"), "{head}");
}

/// An authority, as PEM, and a server with a certificate of it for `web.n.svc`.
async fn tls_server() -> (String, SocketAddr) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["web.n.svc".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (to, _) = server("127.0.0.1:0", move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await?;
            request_head(&mut stream).await?;
            // Closed without saying so, as many do.
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nok").await?;
            stream.flush().await
        }
    })
    .await;
    (authority.pem(), to)
}

#[rstest::rstest]
#[case::the_right_one(true, "web.n.svc", "ok")]
#[case::another_authority(false, "web.n.svc", "tls")]
#[case::another_name(true, "other.n.svc", "tls")]
#[tokio::test]
async fn a_certificate_has_to_be_of_the_authority_and_for_the_name(
    #[case] right: bool,
    #[case] name: &'static str,
    #[case] expected: &str,
) {
    let (pem, to) = tls_server().await;
    let pem = if right { pem } else { tls_server().await.0 };
    let server = ServerName::try_from(name).unwrap();
    let what = |config| Ask::Http {
        request: request("/", name),
        expected: vec![200..=399],
        tls: Some((config, server.clone())),
    };
    assert_eq!(label(to, &what(tls::verified(&pem).unwrap())).await, expected);
    assert_eq!(label(to, &what(tls::unverified().unwrap())).await, "ok", "without verifying any will do");
}

#[tokio::test]
async fn plain_text_is_no_tls() {
    let (to, _) = answering(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n".to_vec(), false).await;
    let server = ServerName::try_from("web.n.svc").unwrap();
    let tls = Some((tls::unverified().unwrap(), server));
    let what = Ask::Http { request: request("/", "web.n.svc"), expected: vec![200..=399], tls };
    let label = label(to, &what).await;
    assert!(label == "tls" || label == "timeout", "{label}");
}
