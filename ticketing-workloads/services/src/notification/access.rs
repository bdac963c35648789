//! How this service proves itself to the mail server, and the server to this service.

use super::Settings;
use super::mail::MailError;
use super::sessions::Encryption;
use crate::host::StartError;
use crate::password_file::PasswordFile;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, TlsParameters};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::path::Path;

/// Whom to log in as.
pub struct Login {
    user: String,
    password: Password,
}

enum Password {
    Given(String),
    File(PasswordFile),
}

impl Login {
    /// As the settings say; `None`: nobody logs in.
    pub fn new(settings: &Settings) -> Result<Option<Self>, StartError> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let file = settings.smtp_password_file.as_deref();
        let (user, password) = match (given(&settings.smtp_user), file, given(&settings.smtp_password)) {
            (Some(user), Some(file), _) => (user, Password::File(PasswordFile::new(file, "mail server password"))),
            (Some(user), None, Some(password)) => (user, Password::Given(password)),
            (None, Some(file), _) => {
                let message = format!(
                    "SMTP_PASSWORD_FILE is {}, and nobody to log in as: set SMTP_USER, too, or neither of them",
                    file.display()
                );
                return Err(StartError::Setting(message));
            }
            (Some(_), None, None) => {
                tracing::warn!("SMTP_USER is set, and no password: set SMTP_PASSWORD_FILE; nobody logs in until then");
                return Ok(None);
            }
            (None, None, _) => return Ok(None),
        };
        if settings.smtp_encryption == Encryption::None {
            tracing::warn!("SMTP_ENCRYPTION is none: the password goes to the mail server as it is");
        }
        Ok(Some(Self { user, password }))
    }

    /// User and password, as they are now.
    pub async fn credentials(&self) -> Result<Credentials, MailError> {
        let password = match &self.password {
            Password::Given(password) => password.clone(),
            Password::File(file) => {
                let read = file.read().await.ok_or_else(|| MailError::NotSent(file.in_words()))?;
                let wrong = |_| MailError::NotSent("the password for the mail server is no text (UTF-8)".to_owned());
                String::from_utf8(read).map_err(wrong)?
            }
        };
        Ok(Credentials::new(self.user.clone(), password))
    }
}

/// Whom to take for the mail server `host`: who has a certificate of a well-known authority, or of one in `ca_file`.
pub fn tls(host: &str, ca_file: Option<&Path>) -> Result<TlsParameters, StartError> {
    let mut parameters = TlsParameters::builder(host.to_owned());
    if let Some(path) = ca_file {
        let wrong = |why: String| StartError::Setting(format!("SMTP_CA_FILE {}: {why}", path.display()));
        let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        if certificates.map_err(|error| wrong(error.to_string()))?.is_empty() {
            return Err(wrong("there is no certificate in it (PEM)".to_owned()));
        }
        let certificates = Certificate::from_pem(&pem).map_err(|error| wrong(error.to_string()))?;
        parameters = parameters.add_root_certificate(certificates);
    }
    parameters.build().map_err(|error| StartError::Setting(format!("SMTP_HOST {host}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::super::sessions::{Server, Sessions};
    use super::*;
    use crate::test_certificate::server_config;
    use clap::Parser;
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Settings,
    }

    fn login(arguments: &[&str]) -> Result<Option<Login>, StartError> {
        let all = ["notification", "--database-url", "postgres://a@b/c"];
        Login::new(&Cli::parse_from(all.iter().chain(arguments)).settings)
    }

    #[test]
    fn a_password_needs_a_user_and_the_other_way_round() {
        assert!(login(&[]).unwrap().is_none());
        assert!(login(&["--smtp-user=me"]).unwrap().is_none());
        assert!(login(&["--smtp-user=", "--smtp-password=x"]).unwrap().is_none());
        assert!(login(&["--smtp-user=me", "--smtp-password=x"]).unwrap().is_some());
        let error = login(&["--smtp-password-file=/x"]).err().unwrap();
        assert!(error.to_string().contains("set SMTP_USER"), "{error}");
    }

    #[tokio::test]
    async fn the_file_stands_above_the_setting_and_is_read_anew() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        let login =
            login(&["--smtp-user=me", "--smtp-password=other", "--smtp-password-file", &path]).unwrap().unwrap();
        let error = login.credentials().await.unwrap_err();
        assert!(error.to_string().contains("it is empty"), "{error}");
        for (content, password) in [("first\n", "first"), (" pä ss\"\\:@%\n", " pä ss\"\\:@%")] {
            std::fs::write(file.path(), content).unwrap();
            let expected = Credentials::new("me".to_owned(), password.to_owned());
            assert_eq!(login.credentials().await.unwrap(), expected);
        }
        std::fs::write(file.path(), [0xff]).unwrap();
        let error = login.credentials().await.unwrap_err();
        assert!(error.to_string().contains("no text"), "{error}");
    }

    /// A mail server that speaks TLS from the first byte on; and the certificate of its authority.
    async fn server() -> (SocketAddr, String) {
        let (config, certificate) = server_config("localhost");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                tokio::spawn(async move {
                    let (read, mut write) = tokio::io::split(stream);
                    let mut lines = BufReader::new(read).lines();
                    let _ = write.write_all(b"220 ready\r\n").await;
                    while let Ok(Some(_)) = lines.next_line().await {
                        if write.write_all(b"250 ok\r\n").await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        (address, certificate)
    }

    #[tokio::test]
    async fn only_a_server_that_is_vouched_for_is_spoken_to() {
        let (address, pem) = server().await;
        let file = tempfile::NamedTempFile::new().unwrap();
        for content in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"] {
            std::fs::write(file.path(), content).unwrap();
            let error = tls("localhost", Some(file.path())).err().unwrap();
            assert!(error.to_string().contains("SMTP_"), "{error}");
        }
        std::fs::write(file.path(), pem).unwrap();
        let begin = async |ca_file: Option<&Path>| {
            let tls = tls("localhost", ca_file).unwrap();
            let server = Server::new("127.0.0.1".to_owned(), address.port(), Encryption::Tls, tls);
            Sessions::new(server, 1).begin(Duration::from_secs(3)).await.map(drop)
        };
        let error = begin(None).await.unwrap_err();
        assert!(matches!(&error, MailError::NotSent(why) if why.contains("certificate")), "{error}");
        begin(Some(file.path())).await.unwrap();
    }
}
