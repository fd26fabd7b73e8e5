(** When the first order is the whole shift

    Claims, for updates of any size and any activation φ.
      W_d alone:    y_tuned - y = dW_d m                      (remainder 0)
      W_u alone:    y_tuned - y = W_d (φ(a_g) ⊙ dW_u u)       (remainder 0)
      W_d and W_u:  y_tuned - y = both terms above
                                  + dW_d (φ(a_g) ⊙ dW_u u)    (the only remainder)
      attention, pattern held fixed: the output W_o W_v X a of a head is affine in
      W_o alone and in W_v alone; together they leave dW_o dW_v X a.

    Not said here.  Exact means at the module's own output with its input held
    fixed: not after a norm that follows it, nor in later blocks.  W_g, W_q and
    W_k are never exact, they pass through φ or through the softmax. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Glu.
Variables (R : comRingType) (d n o : nat) (phi : R -> R).
Implicit Types (Wg Wu dWu : 'M[R]_(n, d)) (Wd dWd : 'M[R]_(o, n)) (u : 'cV[R]_d).

(** Updating W_d alone shifts y by dW_d m, exactly. *)
Theorem down_exact Wg Wu Wd dWd u :
  glu phi Wg Wu (Wd + dWd) u
    = glu phi Wg Wu Wd u + dWd *m gate phi (Wg *m u) (Wu *m u).
Proof. exact: mulmxDl. Qed.

(** Updating W_u alone shifts y by W_d (φ(a_g) ⊙ dW_u u), exactly. *)
Theorem up_exact Wg Wu dWu Wd u :
  glu phi Wg (Wu + dWu) Wd u
    = glu phi Wg Wu Wd u + Wd *m gate phi (Wg *m u) (dWu *m u).
Proof. by rewrite /glu mulmxDl /gate hadDr mulmxDr. Qed.

(** Updating W_d and W_u together leaves one cross term, dW_d (φ(a_g) ⊙ dW_u u). *)
Theorem up_down_cross_term Wg Wu dWu Wd dWd u :
  glu phi Wg (Wu + dWu) (Wd + dWd) u
    = glu phi Wg Wu Wd u
      + (dWd *m gate phi (Wg *m u) (Wu *m u) + Wd *m gate phi (Wg *m u) (dWu *m u))
      + dWd *m gate phi (Wg *m u) (dWu *m u).
Proof.
rewrite down_exact up_exact mulmxDl /gate hadDr mulmxDr.
by rewrite -!addrA; congr (_ + _); rewrite addrCA.
Qed.
End Glu.

Section Head.
Variables (R : comRingType) (d k o T : nat).

(** Output of one attention head at one token: W_o W_v X a, with X the inputs of
    the T tokens as columns and a the attention weights of this token. *)
Definition head (Wo : 'M[R]_(o, k)) (Wv : 'M[R]_(k, d)) (X : 'M_(d, T)) (a : 'cV_T) :=
  Wo *m (Wv *m X *m a).

(** Updating W_o and W_v leaves exactly dW_o dW_v X a; either of them alone, nothing. *)
Theorem value_output_cross_term Wo dWo Wv dWv X a :
  head (Wo + dWo) (Wv + dWv) X a
    = head Wo Wv X a + (head dWo Wv X a + head Wo dWv X a) + head dWo dWv X a.
Proof.
rewrite /head (mulmxDl Wv) (mulmxDl (Wv *m X)) mulmxDr !mulmxDl.
by rewrite -!addrA.
Qed.
End Head.
