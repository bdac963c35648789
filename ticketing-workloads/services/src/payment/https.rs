//! The way to a provider: HTTPS with verified certificates, our API key, and nothing of ours besides. To a simulator, or a proxy
//! of ours that adds both, it is that to our own services.

use super::encrypted::Encrypted;
use crate::host::StartError;
use crate::http_client::{self, Bare, HttpAnswer, HttpCall, HttpError};
use axum::body::Bytes;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use resilience::{Attempt, Dependency, deadline};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tower::ServiceExt;

/// Largest answer that is read, in bytes; and largest page of a list of a hundred objects.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;
/// Time to get a token, if no policy says how long an attempt may take.
const TOKEN_TIME: Duration = Duration::from_secs(5);
/// A token is replaced so long before it ends.
const TOKEN_MARGIN: Duration = Duration::from_secs(60);

/// What a provider knows us by. The files are read for each request, so that a Secret that changes is used at once.
pub enum Credentials {
    /// For the simulators.
    None,
    /// A key that is sent with each request.
    Bearer(PathBuf),
    /// A client id and a secret, for which the provider gives tokens.
    Client { id: PathBuf, secret: PathBuf, token: Mutex<Option<Token>> },
}

pub struct Token {
    value: String,
    until: Instant,
    /// What it was given for.
    basic: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nothing was sent: our key is not there, or is none.
    #[error("{0}")]
    NoKey(String),
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl From<AskError> for HttpError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::NoKey(why) => Self::NotSent(why),
            AskError::Http(error) => error,
        }
    }
}

/// A provider over HTTPS; or over HTTP, without a key.
pub struct Https {
    way: Way,
    credentials: Credentials,
    dependency: Option<&'static Dependency>,
}

enum Way {
    /// As to a service of ours, by the policy: with known endpoints of which one that fails is left out.
    Plain(Bare),
    Encrypted(Encrypted),
}

impl Https {
    /// The provider at `base`. `ca_file`: trusted besides the well-known authorities, in PEM. `dependency`: whose
    /// policy says how long a connection may take; and what else it says holds for the way without encryption.
    pub fn new(
        base: &str,
        ca_file: Option<&Path>,
        credentials: Credentials,
        dependency: Option<&'static Dependency>,
    ) -> Result<Self, StartError> {
        let is_safe = base.parse::<Uri>().is_ok_and(|uri| uri.scheme_str() == Some("https"));
        if !is_safe {
            if !matches!(credentials, Credentials::None) {
                let message =
                    format!("{base}: API keys are sent over https only; set STRIPE_URL and PAYPAL_URL, or no keys");
                return Err(StartError::Setting(message));
            }
            let bare = dependency
                .map_or_else(|| http_client::bare(base), |dependency| http_client::of_dependency(base, dependency));
            return Ok(Self { way: Way::Plain(bare), credentials, dependency });
        }
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(path) = ca_file {
            let wrong = |why: String| {
                StartError::Setting(format!("{} (PROVIDER_CA_FILE, TOKEN_CA_FILE): {why}", path.display()))
            };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))? {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
            }
        }
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| StartError::Setting(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { way: Way::Encrypted(Encrypted::new(base, config, dependency)), credentials, dependency })
    }

    /// One request, with our key.
    pub async fn ask(&self, call: HttpCall) -> Result<HttpAnswer, AskError> {
        self.ask_for(call, MAX_ANSWER_BYTES).await
    }

    /// The same for a page of a list.
    pub async fn ask_for_list(&self, call: HttpCall) -> Result<HttpAnswer, AskError> {
        self.ask_for(call, MAX_LIST_BYTES).await
    }

    async fn ask_for(&self, call: HttpCall, most: usize) -> Result<HttpAnswer, AskError> {
        let authorization = match &self.credentials {
            Credentials::None => None,
            Credentials::Bearer(path) => Some(format!("Bearer {}", secret(path).await?)),
            Credentials::Client { id, secret: path, token } => {
                let basic = BASE64_STANDARD.encode(format!("{}:{}", secret(id).await?, secret(path).await?));
                let known = async {
                    // Held while a new one is asked for: the others wait for that one.
                    let mut token = token.lock().await;
                    let good = |one: &&Token| one.basic == basic && one.until > Instant::now();
                    if let Some(kept) = token.as_ref().filter(good) {
                        return Ok(Ok(kept.value.clone()));
                    }
                    let new = self.token(&basic).await?;
                    Ok::<_, HttpError>(new.map(|new| token.insert(new).value.clone()))
                };
                // Not as long as an attempt: at its end nobody could say that what it is for was not sent.
                let time =
                    self.dependency.map_or(TOKEN_TIME, |one| Duration::from_millis(one.timeouts().per_try_ms) / 2);
                let late = |_| HttpError::NotSent(format!("no token within {} ms", time.as_millis()));
                match tokio::time::timeout(time, known).await.map_err(late)?? {
                    Ok(value) => Some(format!("Bearer {value}")),
                    Err(refusal) => return Ok(refusal),
                }
            }
        };
        let answer = self.send(call, authorization, most).await?;
        if let Credentials::Client { token, .. } = &self.credentials
            && answer.status == StatusCode::UNAUTHORIZED
        {
            // The next request gets another one.
            *token.lock().await = None;
        }
        if answer.status.is_server_error() || answer.status == StatusCode::TOO_MANY_REQUESTS {
            return Err(HttpError::Status(Box::new(answer)).into());
        }
        Ok(answer)
    }

    /// Whether our key is there, and can be sent.
    pub async fn has_key(&self) -> Result<(), AskError> {
        match &self.credentials {
            Credentials::None => {}
            Credentials::Bearer(path) => _ = secret(path).await?,
            Credentials::Client { id, secret: path, .. } => _ = (secret(id).await?, secret(path).await?),
        }
        Ok(())
    }

    /// A new token; or the provider's answer, if it gives none. What failed here did not reach what was asked for.
    async fn token(&self, basic: &str) -> Result<Result<Token, HttpAnswer>, HttpError> {
        let mut call = HttpCall::post("/v1/oauth2/token", &Value::Null);
        call.body = Bytes::from_static(b"grant_type=client_credentials");
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        call.headers.insert(header::CONTENT_TYPE, form);
        let answer = self.send(call, Some(format!("Basic {basic}")), MAX_ANSWER_BYTES).await;
        let answer = answer.map_err(|error| HttpError::NotSent(format!("no token: {error}")))?;
        if answer.status.is_client_error() && answer.status != StatusCode::TOO_MANY_REQUESTS {
            return Ok(Err(HttpAnswer { status: StatusCode::UNAUTHORIZED, ..answer }));
        }
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let (Some(value), Some(seconds)) = (body["access_token"].as_str(), body["expires_in"].as_u64()) else {
            return Err(HttpError::NotSent(format!("no token: status {}", answer.status)));
        };
        let lasts = Duration::from_secs(seconds).saturating_sub(TOKEN_MARGIN);
        let until = Instant::now().checked_add(lasts).unwrap_or_else(Instant::now);
        Ok(Ok(Token { value: value.to_owned(), until, basic: basic.to_owned() }))
    }

    /// Over TLS, the answer has at most `most` bytes; elsewhere what the client between services of ours allows.
    async fn send(&self, call: HttpCall, authorization: Option<String>, most: usize) -> Result<HttpAnswer, HttpError> {
        let encrypted = match &self.way {
            Way::Plain(bare) => {
                // What settles a payment is asked for although nobody waits for it any more.
                let until = deadline::current().filter(|until| *until > tokio::time::Instant::now());
                return match bare.clone().oneshot(Attempt::first(call, until)).await {
                    // Also one that the policy retries may be the provider's word for a "no".
                    Err(HttpError::Status(answer)) if answer.status.is_client_error() => Ok(*answer),
                    result => result,
                };
            }
            Way::Encrypted(encrypted) => encrypted,
        };
        encrypted.send(call, authorization, most).await
    }
}

/// The content of a file with a secret, which can be sent in a header.
async fn secret(path: &Path) -> Result<String, AskError> {
    let no_key = |why: String| AskError::NoKey(format!("{}: {why}", path.display()));
    let text = tokio::fs::read_to_string(path).await.map_err(|error| no_key(error.to_string()))?;
    let text = text.trim();
    if text.is_empty() {
        return Err(no_key("the file is empty".to_owned()));
    }
    if HeaderValue::from_str(text).is_err() {
        return Err(no_key("it is no plain text on one line".to_owned()));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_certificate::server_config;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server that answers with the credentials that it was sent; and the certificate of its authority.
    async fn server(name: &str) -> (std::net::SocketAddr, String) {
        let (config, certificate) = server_config(name);
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut tokens = 0;
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut text = vec![0; 4_096];
                let length = stream.read(&mut text).await.unwrap();
                let text = String::from_utf8_lossy(&text[..length]).into_owned();
                let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with("authorization: "));
                let said = line.unwrap_or("none");
                // How many tokens were asked for so far.
                let token = text.contains("/v1/oauth2/token");
                let said = if token {
                    tokens += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    format!(r#"{{"access_token":"{tokens}","expires_in":3600}}"#)
                } else {
                    said.to_owned()
                };
                let status = if text.contains("/moved") { "302 Found\r\nlocation: /other" } else { "200 OK" };
                let answer =
                    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{said}", said.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
                let _ = stream.shutdown().await;
            }
        });
        (address, certificate)
    }

    #[rstest::rstest]
    #[case("http://provider-simulator:8081")]
    #[case("provider-simulator:8081")]
    #[case("ftp://provider")]
    fn keys_are_not_sent_in_plain_text(#[case] base: &str) {
        let error = Https::new(base, None, Credentials::Bearer("key".into()), None).err().unwrap();
        assert!(error.to_string().contains("https only"), "{error}");
        Https::new(base, None, Credentials::None, None).unwrap();
    }

    #[tokio::test]
    async fn only_a_certificate_that_can_be_verified_gets_our_key_and_the_key_is_read_anew() {
        let (address, pem) = server("localhost").await;
        let directory = tempfile::tempdir().unwrap();
        let (ca, key) = (directory.path().join("ca.pem"), directory.path().join("key"));
        std::fs::write(&ca, pem).unwrap();
        std::fs::write(&key, "sk_first\n").unwrap();
        let base = format!("https://localhost:{}", address.port());
        let bearer = || Credentials::Bearer(key.clone());
        let untrusted = Https::new(&base, None, bearer(), None).unwrap();
        let error = untrusted.ask(HttpCall::get("/")).await.unwrap_err();
        assert!(matches!(&error, AskError::Http(HttpError::NotSent(why)) if why.contains("certificate")), "{error}");
        let other_name = Https::new(&format!("https://{address}"), Some(&ca), bearer(), None).unwrap();
        assert!(matches!(other_name.ask(HttpCall::get("/")).await, Err(AskError::Http(HttpError::NotSent(_)))));

        let https = Https::new(&base, Some(&ca), bearer(), None).unwrap();
        let said = async |path: &str| https.ask(HttpCall::get(path)).await.unwrap();
        assert!(said("/").await.body.ends_with(b"Bearer sk_first"));
        std::fs::write(&key, "sk_second").unwrap();
        assert!(said("/").await.body.ends_with(b"Bearer sk_second"));
        assert_eq!(said("/moved").await.status, StatusCode::FOUND, "redirects are not followed");
        for (text, expected) in [("", "empty"), (" \n", "empty"), ("two\nlines", "one line")] {
            std::fs::write(&key, text).unwrap();
            for result in [https.has_key().await, https.ask(HttpCall::get("/")).await.map(drop)] {
                let error = result.unwrap_err();
                assert!(matches!(&error, AskError::NoKey(why) if why.contains(expected)), "{error}");
            }
        }
    }

    /// What the token is for was not sent then; and who comes next waits no longer than that, either.
    #[tokio::test]
    async fn a_token_that_does_not_come_leaves_nothing_in_doubt() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let [id, secret] = ["id", "secret"].map(|name| directory.path().join(name));
        for path in [&id, &secret] {
            std::fs::write(path, "any").unwrap();
        }
        let credentials = Credentials::Client { id, secret, token: Mutex::default() };
        let paypal = dependency(600);
        let https = Https::new(&format!("https://{}", listener.local_addr().unwrap()), None, credentials, Some(paypal));
        let https = https.unwrap();
        let asked = futures::future::join_all((0..2).map(|_| https.ask(HttpCall::get("/"))));
        let answers = tokio::time::timeout(Duration::from_secs(20), asked).await.expect("it is given up");
        for answer in answers {
            let error = answer.unwrap_err();
            let words = "no token within 300 ms";
            assert!(matches!(&error, AskError::Http(HttpError::NotSent(why)) if why == words), "{error}");
        }
    }

    /// One with so much time for an attempt.
    fn dependency(per_try_ms: u64) -> &'static Dependency {
        let mut defaults = super::super::defaults(1);
        defaults.dependencies.get_mut("paypal").unwrap().timeout.per_try_ms = per_try_ms;
        let id = contract::WorkloadId::deployment("default", "payment");
        let resilience = resilience::Resilience::builder(id).dependency("paypal").defaults(defaults).build();
        resilience.dependency("paypal").unwrap()
    }

    #[tokio::test]
    async fn requests_at_the_same_time_share_one_token() {
        let (address, pem) = server("localhost").await;
        let directory = tempfile::tempdir().unwrap();
        let [ca, id, secret] = ["ca.pem", "id", "secret"].map(|name| directory.path().join(name));
        for (path, text) in [(&ca, pem.as_str()), (&id, "id"), (&secret, "secret")] {
            std::fs::write(path, text).unwrap();
        }
        let credentials = Credentials::Client { id, secret, token: Mutex::default() };
        let https = Https::new(&format!("https://localhost:{}", address.port()), Some(&ca), credentials, None).unwrap();
        let answers = futures::future::join_all((0..5).map(|_| https.ask(HttpCall::get("/")))).await;
        for answer in answers {
            assert!(answer.unwrap().body.ends_with(b"Bearer 1"));
        }
    }
}
