#!/bin/busybox sh
# What udhcpc calls: $1 is what happened, the lease is in the environment (busybox
# examples/udhcp/sample.script). The lease's facts stay in /run/imager for the menu.
lease=/run/imager/lease.$interface
servers=/run/imager/dns.$interface

set_routes() {
    ip -4 route flush dev "$interface" proto boot 2>/dev/null
    # Option 121 comes in pairs, and its presence overrules option 3 (RFC 3442).
    set -- ${staticroutes:-$(for gateway in $router; do echo "0.0.0.0/0 $gateway"; done)}
    while [ $# -ge 2 ]; do
        if [ "$2" = 0.0.0.0 ]; then
            ip -4 route add "$1" dev "$interface"
        else
            # A gateway outside of the subnet (a /32 lease) is still on this link.
            ip -4 route add "$2/32" dev "$interface" 2>/dev/null
            ip -4 route add "$1" via "$2" dev "$interface"
        fi
        shift 2
    done
}

case $1 in
deconfig)
    ip -4 addr flush dev "$interface"
    ip link set "$interface" up
    rm -f "$lease" "$servers"
    ;;
bound | renew)
    ip -4 addr replace "$ip/${mask:-24}" ${broadcast:+broadcast "$broadcast"} dev "$interface"
    set_routes
    for server in $dns; do echo "nameserver $server"; done >"$servers"
    [ -z "$domain" ] || echo "search $domain" >>"$servers"
    cat /run/imager/dns.* >/etc/resolv.conf
    for name in ip mask router dns domain hostname serverid lease; do
        eval "echo \"$name=\$$name\""
    done >"$lease.new"
    mv "$lease.new" "$lease"
    ;;
esac
