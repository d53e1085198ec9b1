"""The pages: `/admin/` for administrators on the admin listener, `/usage` for users on the API listener.

They are HTML, CSS and ES modules that the browser gets as they are here: nothing is built, and nothing is loaded from
elsewhere. They use only the JSON APIs and the streams of events, so a script can do what a page can do.

    admin.html, usage.html    the two documents
    common/                   for both: render (the DOM), api (requests), events (streams), format (numbers, times),
                              parts (tables, bars, fields), chart, style.css
    admin/                    app (login, navigation), live (what the stream says), form (from the API's schema),
                              editor (dry runs, conflicts), actions (dialogs of several views), counters (their
                              table), search (no key gets into an address), and a module for each view; quotas has a
                              second one, model_quotas, and users has user and keys
    usage/                    the page of a user

They never insert HTML that is made of texts. A key is only in headers and bodies of requests, in `sessionStorage`,
and in the dialog that shows a new one.
Begin with `admin/app.js`. `files` serves the files.
"""
