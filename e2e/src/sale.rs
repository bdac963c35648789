//! Sales through all services of a cluster, from the gateway on, and what the simulators got of them.

use crate::testbed::{TICKETING, Testbed, TestbedError, until};
use crate::traffic::EVENT;
use http::{Method, Request};
use serde_json::{Value, json};
use std::time::Duration;

/// How long a mail may take.
const MAIL_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks the port `http` of a Service through the API server, which works the same on every provider.
async fn ask(
    testbed: &Testbed,
    service: &str,
    method: Method,
    path: &str,
    body: &Value,
) -> Result<Value, TestbedError> {
    let uri = format!("/api/v1/namespaces/{TICKETING}/services/{service}:http/proxy{path}");
    let body = if method == Method::GET { Vec::new() } else { body.to_string().into_bytes() };
    let expected = || format!("an answer of {service} to {method} {path}");
    let request = Request::builder().method(&method).uri(uri).body(body);
    let request = request.map_err(|error| TestbedError::unexpected(&expected(), &error.to_string()))?;
    let answer = testbed.through.request_text(request).await?;
    serde_json::from_str(&answer).map_err(|error| TestbedError::unexpected(&expected(), &error.to_string()))
}

/// A sale that went through.
#[derive(Debug)]
pub struct Sale {
    /// The booking.
    pub booking: String,
    /// `Confirmed` or `PaymentPending`.
    pub status: String,
    /// Who has charged for it.
    pub charged_by: Vec<String>,
}

/// Looks at the events and books one seat.
pub async fn sell(testbed: &Testbed, email: Option<&str>) -> Result<Sale, TestbedError> {
    let events = ask(testbed, "gateway", Method::GET, "/api/events", &Value::Null).await?;
    if !events["events"].as_array().is_some_and(|events| events.iter().any(|event| event["eventId"] == EVENT)) {
        return Err(TestbedError::unexpected("the first event in the catalog", &events.to_string()));
    }
    let order = json!({"eventId": EVENT, "userId": "ann", "ticketCount": 1, "email": email});
    let booked = ask(testbed, "gateway", Method::POST, "/api/bookings", &order).await?;
    let text = |name: &str| booked[name].as_str().unwrap_or_default().to_owned();
    let booking = text("bookingId");
    let charges = ask(testbed, "provider-simulator", Method::GET, "/charges", &Value::Null).await?;
    let charges = charges["charges"].as_array().cloned().unwrap_or_default();
    let own = charges.into_iter().filter(|charge| charge["key"] == booking.as_str());
    let charged_by = own.filter_map(|charge| Some(charge["provider"].as_str()?.to_owned())).collect();
    Ok(Sale { status: text("status"), booking, charged_by })
}

/// Waits until the mail for a booking has arrived.
pub async fn mailed(testbed: &Testbed, booking: &str) -> Result<(), TestbedError> {
    until(MAIL_TIMEOUT, "the mail for the booking", || async {
        let mails = ask(testbed, "mail-sink", Method::GET, "/mails", &Value::Null).await?;
        let mails = mails["mails"].as_array().cloned().unwrap_or_default();
        let found = mails.iter().any(|mail| mail["messageId"].as_str().is_some_and(|id| id.contains(booking)));
        Ok(if found { Ok(()) } else { Err(format!("{} mails for others", mails.len())) })
    })
    .await
}

/// Says how the provider shaped as Stripe behaves from now on; `{}`: well.
pub async fn stripe(testbed: &Testbed, behaviour: &Value) -> Result<(), TestbedError> {
    ask(testbed, "provider-simulator", Method::PUT, "/providers/stripe", behaviour).await.map(drop)
}
